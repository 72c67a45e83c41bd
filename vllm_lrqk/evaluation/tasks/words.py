"""The words that texts are made of, and endless streams of them."""

import random
from collections.abc import Callable

ADJECTIVES = """
able amber ancient azure bitter blank blunt bold brave brief bright broad broken calm careful cheap chilly clean
clear clever cold cosy crisp curious daring dark deep dense distant dry dull dusty eager early easy elegant empty even
faint fair famous fancy fast fierce fine firm flat fond fragile free fresh frosty gentle giant glad golden grand great
green grey happy hard harsh heavy hidden hollow honest huge humble idle jolly keen kind large late lazy light little
lively lonely long loud loyal lucky mellow merry mild modern narrow neat noble odd pale plain polite proud quick quiet
rapid rare rough round royal rusty sharp shiny short silent silver simple sleepy slow smooth soft solid
""".split()

NOUNS = """
acorn anchor apple arrow badge barrel basket beacon bell blanket boat bottle branch bridge brook bucket button cabin
camel candle canyon castle chair chapel cherry clock cloud coin compass copper corner cottage crane crown desert door
drum eagle engine falcon feather fence ferry field flame flute forest fountain garden gate glove goat harbour hammer
harvest hill horse island jacket jewel kettle key kite ladder lake lantern leaf lemon lion marble market meadow mirror
moon mountain needle oak ocean onion orchard otter owl palace paper pearl pebble pencil piano pillow planet pocket pond
quilt rabbit raven ribbon river road rope saddle sail school shell ship shore spoon stone storm table temple tiger tower
""".split()

VERBS = """
stands waits rests turns shines fades drifts falls rises sleeps moves hides leans sinks bends glows
""".split()
PLACES = "near behind beside beyond above below under across".split()

FIRST_NAMES = """
Ada Alan Alma Anton Bella Boris Carla Cedric Clara Conrad Dora Edgar Elena Emil Esther Felix Flora Frank Gloria Greta
Harold Helen Hugo Ines Ivan Jasper Judith Karl Laura Leon Lydia Marco Martha Milo Nadia Nora Oscar Paula Peter Rosa
""".split()
LAST_NAMES = """
Abbott Archer Barlow Becker Bishop Carver Chandler Cooper Dalton Draper Ellis Farmer Fisher Fletcher Foster Gardner
Glover Harper Hooper Keller Lambert Marsh Mercer Miller Norris Osborn Palmer Parker Porter Potter Quinn Ramsey Sawyer
Shepherd Slater Tanner Turner Walker Weaver Wright
""".split()
TOWN_BEGINNINGS = "Ash Birch Black Bran Brook Cold Elm Fair Glen Hazel High Kings Lang Mill North Oak Red Stone".split()
TOWN_ENDINGS = "borough bury combe field ford ham haven ley mouth port stead ton wick wood".split()
OCCUPATIONS = """
baker banker barber brewer builder chemist clerk cook dentist doctor driver farrier florist glazier grocer judge lawyer
librarian mason nurse painter pilot plumber printer sailor sculptor surgeon tailor teacher waiter
""".split()
INSTRUMENTS = """
accordion banjo bassoon bugle cello clarinet cornet fiddle guitar harmonica harp lute mandolin oboe organ recorder
saxophone trombone trumpet tuba ukulele viola violin xylophone zither
""".split()

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
MANY_CODED_WORDS = [first + second + "x" for first in SYLLABLES[:20] for second in SYLLABLES]
"""Words that mean nothing: babax, babex, ..."""
CODED_WORDS = MANY_CODED_WORDS[: 13 * len(SYLLABLES)]


class Stream:
    """Endless units of text, drawn once and in order: `take(5)` begins with `take(4)`."""

    def __init__(self, draw: Callable[[], str]) -> None:
        self._draw = draw
        self._drawn: list[str] = []

    def take(self, count: int) -> list[str]:
        """The first `count` units."""
        while len(self._drawn) < count:
            self._drawn.append(self._draw())
        return self._drawn[:count]


def prose(rng: random.Random) -> Stream:
    """Sentences of filler, with no numbers in them."""

    def draw() -> str:
        place, verb = rng.choice(PLACES), rng.choice(VERBS)
        first, second = (f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
        return f"The {first} {verb} {place} the {second}."

    return Stream(draw)


def distinct(draw: Callable[[], str], taken: set[str]) -> str:
    """Something drawn that is not in `taken`; it is added there."""
    while (found := draw()) in taken:
        pass
    taken.add(found)
    return found


def listing(items: list[str] | tuple[str, ...]) -> str:
    """One, two and three."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def scatter(units: list[str], inserts: list[tuple[float, str]], separator: str = " ") -> str:
    """The units with inserts at their depths (0 to 1), in the order of the depths."""
    text: list[str] = []
    begin = 0
    for depth, insert in sorted(inserts):
        end = round(depth * len(units))
        text += [*units[begin:end], insert]
        begin = end
    return separator.join(text + units[begin:])
