"""LeNet and the steps that train it: plain torch, no files, no cluster."""
