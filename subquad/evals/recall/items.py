"""Generated texts with answers inside. Each maker is `maker(random, units, depth, **own) -> Item`; `units` is the size knob (sentences, lines,
words), `depth` from 0 (start of the text) to 1 (end) says where the answer stands.

The words are made up or plain, so that no model knows an answer from its training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

FILLERS = (
    "The morning was quiet and the road was empty.",
    "A cart stood by the gate and nobody came for it.",
    "Rain had fallen in the night, and the grass was wet.",
    "Somebody had left a lamp burning in the window.",
    "The baker opened his door and swept the step.",
    "Two birds sat on the wall and looked at the river.",
    "It was too early for the market to begin.",
    "The clock on the tower was a little slow.",
)
FIRST_NAMES = ("Alma", "Bruno", "Carla", "Dennis", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jasper", "Klara", "Linus", "Marta", "Nils", "Olga",
               "Peter", "Rosa", "Simon", "Thea", "Victor")  # fmt: skip
LAST_NAMES = ("Abel", "Berger", "Conrad", "Dorn", "Engel", "Falk", "Gruber", "Hansen", "Ivers", "Jansen", "Keller", "Lindt", "Moser", "Novak",
              "Olsen", "Pohl", "Quist", "Reuter", "Sander", "Thorn", "Ulrich", "Vogel", "Weber", "Young", "Zander")  # fmt: skip
# Short plain nouns, one token each in most vocabularies: a small model can match them, where it stumbles over made-up words.
PLAIN = (
    "apple arm baby bag ball band bank base bath beach bear bed bell bench bike bird block board boat body bone book boot bottle bowl "
    "box boy branch bread bridge brother bucket bus butter button cake camera camp candle cap car card castle cat chain chair chalk "
    "cheese child church circle city class clock cloud coat coffee coin color cook copper corn cotton country cow cream crown cup "
    "curtain daughter deer desk dish doctor dog doll door dress drum duck dust eagle ear earth egg engine eye face farm father feather "
    "fence field finger fire fish flag floor flower foot forest fork fox frame friend frog fruit garden gate gift girl glass goat gold "
    "grain grass ground guitar hair hall hammer hand hat head heart hill honey hook horn horse hospital hotel house ice ink iron island "
    "jacket jar judge key king kitchen knee knife ladder lake lamp land leaf leather leg lemon letter library lion lock map market meat "
    "metal milk mirror money monkey moon morning mother mountain mouse mouth nail neck needle nest night nose nurse ocean office oil "
    "onion orange oven owner page paint paper park path pen pencil pepper piano picture pig pipe plane plant plate pocket pool potato "
    "prince prize queen rabbit rain ring river road rock roof room root rope rose salt sand school seat seed shadow sheep shelf ship "
    "shirt shoe shop silk silver sister skin sky snake snow soap soldier son soup spider spoon spring square star station steel stone "
    "storm street sugar suit summer sun table tail tank teacher team tent ticket tiger tool tooth tower town toy train tray tree truck "
    "tunnel uncle valley village voice wall watch water wave wheel wind window wine wing winter wire wolf woman wood wool worm yard "
).split()
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
OPERATORS = ("MIN", "MAX", "MED", "SM")


@dataclass(frozen=True)
class Item:
    """parts: (text, whether it is an answer), to be joined. chance: how often a guess is right that knows what may be an answer, not which."""

    parts: tuple[tuple[str, bool], ...]
    chance: float

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)

    @property
    def answers(self) -> list[tuple[int, int]]:
        """[start, stop) of each answer in `text`, in characters."""
        found, at = [], 0
        for text, is_answer in self.parts:
            if is_answer:
                found.append((at, at + len(text)))
            at += len(text)
        return found


Maker = Callable[..., Item]


def passkey(random: Random, units: int, depth: float) -> Item:
    """A five-digit key in `units` sentences of no interest."""
    key = str(random.randint(10_000, 99_999))
    text = hidden(random, units, {depth: [f"The pass key is {key}. Remember it. {key} is the pass key."]})
    return Item(
        ((f"There is a pass key in this text. Find it.\n\n{text}\n\nWhat is the pass key? The pass key is", False), (f" {key}", True)),
        1 / 90_000,
    )


def niah_single(random: Random, units: int, depth: float) -> Item:
    """A needle in a haystack by RULER's definition: a name's number of seven digits."""
    return _niah(random, units, depth, "single", 1)


def niah_multi_key(random: Random, units: int, depth: float, needles: int = 4) -> Item:
    """`needles` needles of different names, one is asked for."""
    return _niah(random, units, depth, "multi_key", needles)


def niah_multi_value(random: Random, units: int, depth: float, needles: int = 4) -> Item:
    """`needles` needles of one name, all are asked for, in the order of the text (RULER takes any order)."""
    return _niah(random, units, depth, "multi_value", needles)


def _niah(random: Random, units: int, depth: float, variant: str, needles: int) -> Item:
    """single: one needle. multi_key: `needles` needles of different names, one is asked for. multi_value: `needles` needles of one name, all are
    asked for, in their order."""
    names = made_up(random, needles if variant == "multi_key" else 1)
    values = [str(value) for value in random.sample(range(1_000_000, 10_000_000), needles)]
    told = [f"The secret number of {names[i % len(names)]} is {value}." for i, value in enumerate(values)]
    places: dict[float, list[str]] = {depth: [told[0]]}
    for sentence in told[1:]:
        places.setdefault(random.random(), []).append(sentence)
    text = hidden(random, units, places)
    head = f"Secret numbers are hidden in this text. Remember them.\n\n{text}\n\n"
    if variant != "multi_value":
        return Item(
            ((f"{head}The secret number of {names[0]} is", False), (f" {values[0]}", True)), 1 / needles if needles > 1 else 1 / 9_000_000
        )
    order = sorted(values, key=text.index)
    parts = [(f"{head}The secret numbers of {names[0]}, in the order of the text, are", False)]
    return Item((*parts, *listed(order)), 1 / needles)


def phonebook(random: Random, units: int, depth: float) -> Item:
    """`units` names with numbers, one is asked for; two are asked first, to show how (Waleffe et al. 2024)."""
    every = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    while len(every) < units:
        every += [f"{first} {middle}. {last}" for middle in "ABCDEFGHJKLMNPRSTW" for first in FIRST_NAMES for last in LAST_NAMES]
    names = random.sample(every, max(units, 4))
    numbers = [str(number) for number in random.sample(range(1_000_000, 10_000_000), len(names))]
    asked = round(depth * (len(names) - 1))
    examples = random.sample([i for i in range(len(names)) if i != asked], 2)
    book = "\n".join(f"{name}: {number}" for name, number in zip(names, numbers, strict=True))
    shown = "".join(f"{names[i]}: {numbers[i]}\n" for i in examples)
    return Item(
        ((f"Phone book\n\n{book}\n\nNumbers asked for\n\n{shown}{names[asked]}:", False), (f" {numbers[asked]}", True)), 1 / len(names)
    )


def mqar(random: Random, units: int, depth: float, queries: int = 4) -> Item:
    """Multi-query associative recall: `units` pairs of words (plain ones as far as they go, else made-up ones), then `queries` of their first words;
    one stands at `depth`, the others anywhere."""
    units = max(units, queries)
    words = random.sample(PLAIN, 2 * units) if 2 * units <= len(PLAIN) else made_up(random, 2 * units)
    keys, values = words[:units], words[units:]
    first = round(depth * (units - 1))
    asked = [first, *random.sample([i for i in range(units) if i != first], queries - 1)]
    random.shuffle(asked)
    parts: list[tuple[str, bool]] = [
        ("".join(f"{key} = {value}\n" for key, value in zip(keys, values, strict=True)) + "\nThe same again:\n", False)
    ]
    for i in asked:
        parts += [(f"{keys[i]} =", False), (f" {values[i]}", True), ("\n", False)]
    return Item(tuple(parts[:-1]), 1 / units)


def copying(random: Random, units: int, depth: float) -> Item:
    """`units` made-up words, then all of them again: every word but the first counts. `depth` means nothing here."""
    words = made_up(random, max(units, 2))
    again = ((f" {word}", True) for word in words[1:])
    return Item(((" ".join(words) + "\n\nThe same words again:\n\n" + words[0], False), *again), 1 / len(words))


def selective_copying(random: Random, units: int, depth: float, marked: int = 8) -> Item:
    """`units` lines with a word each, `marked` of them marked: the marked words are asked for, in their order."""
    units = max(units, marked)
    words, chosen = made_up(random, units), sorted(random.sample(range(units), marked))
    lines = "".join(f"{'yes' if i in chosen else 'no'}: {word}\n" for i, word in enumerate(words))
    head = f"{lines}\nAll lines that start with yes:\n\n"
    parts = [part for i in chosen for part in (("yes:", False), (f" {words[i]}", True), ("\n", False))]
    return Item(((head, False), *parts[:-1]), 1 / units)


def induction(random: Random, units: int, depth: float) -> Item:
    """`units` made-up words; the last one has stood at `depth` before, and what came after it then is asked for."""
    words = made_up(random, max(units, 3))
    at = min(round(depth * (len(words) - 1)), len(words) - 2)
    return Item(((" ".join([*words, words[at]]), False), (f" {words[at + 1]}", True)), 1 / len(words))


def listops(random: Random, units: int, depth: float, shots: int = 4) -> Item:
    """Nested MIN, MAX, MED and SM (sum modulo 10) of digits, in Long Range Arena's notation, `units` numbers and operators long; `shots` short
    ones are solved first."""
    parts = ""
    for _ in range(shots):
        tree = expression(random, 5)
        parts += f"{written(tree)} = {value_of(tree)}\n"
    tree = expression(random, max(units, 4))
    return Item(((f"{parts}{written(tree)} =", False), (f" {value_of(tree)}", True)), 0.1)


def variable_tracking(random: Random, units: int, depth: float, hops: int = 3, chains: int = 2) -> Item:
    """Variable tracking by RULER's definition: `chains` values, each handed on `hops` times among sentences of no interest; the names that hold
    the first value are asked for, in the order they got it. `depth`: where the first value is set."""
    names = [name.upper() for name in made_up(random, chains * (hops + 1))]
    values = random.sample(range(10_000, 100_000), chains)
    places: dict[float, list[str]] = {}
    for chain in range(chains):
        own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        start = depth if chain == 0 else random.random()
        at = sorted(start + (1 - start) * random.random() for _ in range(hops))
        told = [f"VAR {own[0]} = {values[chain]}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(own))]
        for place, sentence in zip([start, *at], told, strict=True):
            places.setdefault(place, []).append(sentence)
    head = f"Remember which variable has which value.\n\n{hidden(random, units, places)}\n\nThe variables with the value {values[0]} are"
    return Item(((head, False), *listed(names[: hops + 1])), 1 / len(names))


# ---- pieces ------------------------------------------------------------------------------------------------------------------------------


def hidden(random: Random, units: int, places: dict[float, Sequence[str]]) -> str:
    """`units` filler sentences with sentences put in where `places` (share of the text) says."""
    start = random.randrange(len(FILLERS))
    fillers = [FILLERS[(start + i) % len(FILLERS)] for i in range(units)]
    at: dict[int, list[str]] = {}
    for place in sorted(places):
        at.setdefault(round(place * units), []).extend(places[place])
    return " ".join(sentence for i in range(units + 1) for sentence in (*at.get(i, ()), *fillers[i : i + 1]))


def made_up(random: Random, count: int) -> list[str]:
    """Different words such as 'kolamu'; longer ones where there are not enough."""
    syllables, found = 2 if count < 500 else 3, {}
    while len(found) < count:
        found["".join(random.choice(CONSONANTS) + random.choice(VOWELS) for _ in range(syllables))] = None
    return list(found)


def listed(answers: Sequence[str]) -> list[tuple[str, bool]]:
    """' a', ',', ' b', ..."""
    return [part for answer in answers for part in ((f" {answer}", True), (",", False))][:-1]


Tree = int | tuple[str, list["Tree"]]


def expression(random: Random, size: int) -> Tree:
    """A tree with about `size` operators and digits, no deeper than it must be to hold two to five arguments everywhere."""
    if size <= 1:
        return random.randrange(10)
    arguments = min(random.randint(2, 5), size - 1) if size > 2 else 2
    shares = [(size - 1) // arguments + (i < (size - 1) % arguments) for i in range(arguments)]
    return random.choice(OPERATORS), [expression(random, share) for share in shares]


def written(tree: Tree) -> str:
    """'[MAX 2 9 [MIN 4 7 ] 0 ]'."""
    return str(tree) if isinstance(tree, int) else f"[{tree[0]} {' '.join(written(part) for part in tree[1])} ]"


def value_of(tree: Tree) -> int:
    """MED is the lower median, SM the sum modulo 10."""
    if isinstance(tree, int):
        return tree
    values = sorted(value_of(part) for part in tree[1])
    return {"MIN": values[0], "MAX": values[-1], "MED": values[(len(values) - 1) // 2], "SM": sum(values) % 10}[tree[0]]
