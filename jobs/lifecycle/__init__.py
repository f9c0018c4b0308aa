"""A job's life, from its submission to what follows its end.

transitions: the diagram of all statuses and moves, and the functions that other packages call.
moves: where each move leads, and the conditional write that every move is.
requests: the moves of users (submit, pause, resume, cancel, edit, retry, delete).
claims: the moves of the worker that holds the lease (claim, heartbeat, checkpoint, the way out of running).
recovery: the moves of jobs that no worker holds (lost lease, next attempt, checked dataset).
submission: what a user requests, checked and turned into the row of a job. warnings: shown before it starts.
finalize: what follows an end or a deletion. estimates: how long jobs take.
"""
