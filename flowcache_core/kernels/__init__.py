"""Operations that know tensors and numbers only: each file holds a reference, its faster forms, and the choice between them."""
