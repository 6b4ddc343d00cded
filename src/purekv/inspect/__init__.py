"""Looking at one prompt: what each layer's attention saw, and which tokens stayed for it."""
