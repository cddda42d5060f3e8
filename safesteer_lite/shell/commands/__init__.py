"""The commands: each reads its flags, calls what does the work, and shows the result."""
