"""What a config takes on TPUs that are not here: compile, read, price."""
