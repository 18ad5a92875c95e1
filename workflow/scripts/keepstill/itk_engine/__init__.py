"""ITK as a second opinion: estimation and reslicing that share no kernel with our own."""
