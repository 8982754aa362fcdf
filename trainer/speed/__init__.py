"""What makes a step faster and changes nothing of what it computes."""
