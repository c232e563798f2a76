"""What people see of each command's result."""
