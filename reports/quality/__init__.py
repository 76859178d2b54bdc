"""What optimisations do to what is learnt: a real model, the same tokens, with each of them and without."""
