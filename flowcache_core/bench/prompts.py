"""The fixed prompts and seeds of every bench: never change a line, only add below."""

PROMPTS = (
    "red circle moves right, blue square moves down",
    "yellow triangle moves left quickly",
    "green star stands still, magenta circle moves up",
    "cyan square moves right slowly",
    "orange circle moves down, purple star moves left",
    "blue triangle stands still",
    "red square moves up, yellow circle moves left, green star stands still",
    "magenta star moves right quickly, camera pans up",
    "purple circle moves down slowly",
    "cyan triangle moves left, orange square moves right",
    "green circle moves right, grey bar stands still",
    "yellow star moves up, red triangle stands still",
    "blue circle moves left, camera pans right",
    "orange star moves right, cyan circle moves down, magenta square stands still",
    "red star moves left",
    "purple square moves up quickly, green triangle moves down",
)


def seed_of(index: int) -> int:
    return 1000 + index
