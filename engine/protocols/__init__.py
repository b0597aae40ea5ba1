"""How features are judged: one protocol a file, each a function of features and labels."""
