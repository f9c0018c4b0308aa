"""A typical fine-tuning script: it uses only the `openai` package, OPENAI_BASE_URL and OPENAI_API_KEY.

It follows, step by step, the OpenAI Cookbook's "How to fine-tune chat models"
(openai/openai-cookbook: examples/How_to_finetune_chat_models.ipynb), and for the result file the "Fine tuning
classification example" (examples/Fine-tuned_classification.ipynb). The recipes themselves are invented.
"""

import csv
import io
import itertools
import json
import sys
import time
from pathlib import Path

from openai import OpenAI

client = OpenAI()
folder = Path(sys.argv[1])

# ---- Data preparation ----

system_message = "You are a helpful recipe assistant. Extract the generic ingredients."
amounts = ["1 c.", "2 Tbsp.", "1/2 tsp.", "3 oz."]
foods = ["sugar", "milk", "butter", "salt", "flour", "pepper", "rice", "corn"]
titles = ["Plain Cookies", "Sunday Soup", "Corn Bread", "Cold Pudding"]


def create_user_message(title, ingredients):
    return f"Title: {title}\n\nIngredients: {json.dumps(ingredients)}\n\nGeneric ingredients: "


def prepare_example_conversation(number, pair):
    ingredients = [f"{amounts[(number + i) % 4]} {food}" for i, food in enumerate(pair)]
    return {
        "messages": [
            {"role": "system", "content": system_message},
            {"role": "user", "content": create_user_message(titles[number % 4], ingredients)},
            {"role": "assistant", "content": json.dumps(pair)},
        ]
    }


def write_jsonl(data_list, path):
    with path.open("w") as out:
        for entry in data_list:
            out.write(json.dumps(entry) + "\n")


conversations = [
    prepare_example_conversation(number, list(pair))
    for number, pair in enumerate(itertools.permutations(foods, 2))
]
training_data, validation_data, test_data = conversations[:44], conversations[44:55], conversations[55:]
training_path, validation_path = folder / "training.jsonl", folder / "validation.jsonl"
write_jsonl(training_data, training_path)
write_jsonl(validation_data, validation_path)

# ---- Upload files ----

with training_path.open("rb") as training_fd:
    training_file_id = client.files.create(file=training_fd, purpose="fine-tune").id
with validation_path.open("rb") as validation_fd:
    validation_file_id = client.files.create(file=validation_fd, purpose="fine-tune").id
print("Training file ID:", training_file_id)
print("Validation file ID:", validation_file_id)

# ---- Fine-tuning ----

response = client.fine_tuning.jobs.create(
    training_file=training_file_id,
    validation_file=validation_file_id,
    model="gpt-4o-mini-2024-07-18",
    suffix="recipe-ner",
    seed=42,
)
job_id = response.id
print("Job ID:", response.id)
print("Status:", response.status)

while response.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(1)
    response = client.fine_tuning.jobs.retrieve(job_id)
print("Status:", response.status)
print("Trained Tokens:", response.trained_tokens)

events = client.fine_tuning.jobs.list_events(job_id, limit=50).data
events.reverse()
for event in events:
    print("Event:", event.message)

fine_tuned_model_id = response.fine_tuned_model
if fine_tuned_model_id is None:
    raise RuntimeError("Fine-tuned model ID not found. Your job has likely not been completed yet.")
print("Fine-tuned model ID:", fine_tuned_model_id)

# ---- Result file ----

result_file = client.files.retrieve(response.result_files[0])
content = client.files.content(result_file.id)
results = list(csv.DictReader(io.StringIO(content.text)))
print("Result rows:", len(results))
print("First loss:", next(row["train_loss"] for row in results if row["train_loss"]))
print("Last loss:", [row["train_loss"] for row in results if row["train_loss"]][-1])
print("Validation loss:", [row["valid_loss"] for row in results if row["valid_loss"]][-1])

# ---- Inference ----

completion = client.chat.completions.create(
    model=fine_tuned_model_id, messages=test_data[0]["messages"][:-1], temperature=0, max_tokens=40
)
print("Expected:", test_data[0]["messages"][-1]["content"])
print("Answer:", json.dumps(completion.choices[0].message.content))
