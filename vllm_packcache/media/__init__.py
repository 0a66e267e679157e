"""Pictures and videos: files as a person sees them, and files of what was made."""
