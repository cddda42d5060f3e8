"""The run folder: settings, events, published results, and files that survive a kill."""
