"""What is heavy or talks to the outside: one file a tool, each imported on use."""
