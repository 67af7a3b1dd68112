"""What training and evaluation both read: the synthetic world of `scenes` and readers of public data sets."""
