"""What a user can see of it: explanations and pictures."""
