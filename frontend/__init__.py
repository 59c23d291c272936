"""What a user calls: compile, the torch.compile backend, capture, raising, the report and the command line."""
