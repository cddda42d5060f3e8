"""The six stages of a run, one file each, in the order in which they run."""
