"""What this machine has, what a model needs of it, and the decision that follows: before anything is downloaded.

Read in order: `machine` (with `limits` and `disk`), a model's `shape`, its `need`, the `backend` chosen, the `doctor`.
"""
