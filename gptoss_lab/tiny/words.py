"""The words of the tiny model: what its texts are made of, and its vocabulary.

What a piece begins with matters: the o200k pattern gives a word the one space or sign before it.
"""

NAMES = "Tom Sue Bob Kim Ann Max Eva Leo Mia Sam Zoe Ben Amy Dan Ivy Joe".split()
OBJECTS = "ball cup hat book cake toy kite drum box key ring coat bag pen map lamp".split()
ANIMALS = "dog cat bird fish frog horse duck mouse".split()
COLOURS = "red blue green black white pink gold gray brown purple".split()
PLACES = "park shop farm lake school garden house beach forest river".split()
SIZES = "big small old new soft funny quiet fast".split()
FEELINGS = "happy sad tired hungry proud scared".split()
DID = "found lost took saw hid washed fixed wanted".split()
WEATHER = "sunny rainy cold warm windy".split()
STORY = ("The day and went to the had a They near was very like your said Then gave At end of home with told story "
         "about ran slept under tree sang sun")

OBJETOS = "libro sombrero tambor lápiz coche globo".split()
ANIMALES = "perro gato pato caballo".split()
COLORES = "rojo negro blanco amarillo".split()
LUGARES = "parque lago campo bosque".split()
SENTIA = "contento triste cansado asustado".split()
CUENTO = "día fue al con tenía un y Allí vio cerca del El estaba muy le dio el Al final volvió casa durmió"

FUNCTIONS = "foo bar baz calc step".split()
LETTERS = "abcdefgxyz"

_BARE = """system developer user assistant analysis commentary final functions json
    =functions =assistant .calc Reasoning namespace type of add map find times brackets def print no One Un"""
_SPACED = """high medium low Tools functions namespace string any tool return if for in range i j"""
_SIGNS = ["\n\n", ".\n", ")\n", "):\n", ":\n", ",\n", " {\n\n", " {\n", ";\n\n", "})", " =>", " (_:", " =", " +=",
          " +", " -", " *", " >", " //", ' "', ',"', '{"', '":"', '"}', "   ", "       ", " [", " (", "##"]  # fmt: skip


def pieces() -> list[str]:
    """Every piece of the vocabulary that is longer than a byte, in the order of its ids."""
    spaced = [*NAMES, *OBJECTS, *ANIMALS, *COLOURS, *PLACES, *SIZES, *FEELINGS, *DID, *WEATHER, *STORY.split(),
              *OBJETOS, *ANIMALES, *COLORES, *LUGARES, *SENTIA, *CUENTO.split(), *FUNCTIONS, *LETTERS,
              *_SPACED.split()]  # fmt: skip
    return list(dict.fromkeys([f" {word}" for word in spaced] + _BARE.split() + _SIGNS))
