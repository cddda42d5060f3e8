"""Getting a model: a folder, the model hub, the demo's file; nothing here runs one."""
