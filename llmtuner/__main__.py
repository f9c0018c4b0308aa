from llmtuner.processes import main

main()
