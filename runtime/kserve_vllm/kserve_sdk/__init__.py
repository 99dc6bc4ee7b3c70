"""What exists because of KServe's SDK: the `kserve.Model` and its data plane."""
