"""From a dense checkpoint to a MEO model, and back."""
