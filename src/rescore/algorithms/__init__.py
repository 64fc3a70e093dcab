"""One method, one file: hyper-parameters, record, credit and loss."""
