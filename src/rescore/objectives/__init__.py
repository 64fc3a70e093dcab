"""What to minimise: losses, divergences and advantages as functions of tensors."""
