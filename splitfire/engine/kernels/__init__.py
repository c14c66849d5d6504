"""One op per file: what it computes, its torch reference, and (later) its Triton and CPU bodies. Importing touches no device."""
