"""How the codes and qparams of a weight are found: by rounding, from its values alone, or with calibration data."""
