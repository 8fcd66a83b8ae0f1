"""Parts of `structure-linear`: factors of a matrix, and the operations that multiply by them."""
