"""Text files of the flow, read and written strictly, and locks on files and folders."""
