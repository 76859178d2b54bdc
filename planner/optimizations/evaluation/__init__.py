"""What is made of held-out documents."""
