"""The prompt sets of the B²-DiffuRL paper (arXiv 2503.11240) and of DDPO (arXiv 2305.13301).

Each set comes from its rule. The test sets hold combinations that the training sets do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

# DDPO's 45 animals, in its order, and its activities.
_ANIMALS = """
    cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear
    raccoon fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake
    turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo
"""
ANIMALS = tuple(_ANIMALS.split())
ACTIVITIES = ("washing dishes", "riding a bike", "playing chess")

# Fruit: its two usual colours, and an odd one.
FRUIT = {
    "apple": ("red", "green", "yellow"),
    "banana": ("yellow", "brown", "green"),
    "orange": ("orange", "yellow", "green"),
    "strawberry": ("red", "green", "white"),
    "grape": ("purple", "green", "black"),
    "watermelon": ("red", "green", "white"),
    "kiwi": ("brown", "green", "white"),
    "mango": ("orange", "yellow", "green"),
    "pear": ("green", "yellow", "brown"),
    "pineapple": ("yellow", "brown", "green"),
    "peach": ("orange", "yellow", "red"),
    "plum": ("purple", "green", "red"),
    "blueberry": ("blue", "purple", "black"),
    "raspberry": ("red", "green", "black"),
    "lemon": ("yellow", "green", "white"),
    "lime": ("green", "yellow", "white"),
    "avocado": ("green", "brown", "yellow"),
    "cherry": ("red", "green", "black"),
    "pomegranate": ("red", "pink", "white"),
    "grapefruit": ("pink", "red", "yellow"),
}
VEGETABLES = {
    "carrot": "white",
    "broccoli": "white",
    "tomato": "yellow",
    "cucumber": "white",
    "spinach": "brown",
    "lettuce": "red",
    "bell pepper": "yellow",
    "zucchini": "white",
    "sweet potato": "white",
    "onion": "green",
    "garlic": "green",
    "celery": "white",
    "cabbage": "white",
    "cauliflower": "purple",
    "eggplant": "green",
    "asparagus": "purple",
    "peas": "white",
    "corn": "green",
    "green beans": "purple",
    "brussels sprouts": "white",
}

# Predicate: pairs of objects.
TRAIN_RELATIONS = {
    "on": "car/street, wheel/train, airplane/street, bag/street, dog/boat, cup/shirt, "
    "person/street, laptop/table, person/sofa, glasses/face",
    "under": "chair/umbrella, table/umbrella, tree/sky, building/sky, street/sky, tower/sky, "
    "table/laptop, sofa/person, table/vase, street/car",
    "on the left of": "suitcase/person, dog/person, person/ball, road/grass, person/pillow, "
    "person/bottle, box/post, building/building, car/car, person/person",
    "on the right of": "dog/vase, building/building, kite/kite, ball/person, grass/road, "
    "bowl/plate, building/truck, bottle/person, car/car, truck/car",
}
TEST_RELATIONS = {
    "on": "vase/table, shirt/person, watch/person, jacket/person, motorcycle/road",
    "under": "road/bus, road/building, road/wheel, table/plate, person/umbrella",
    "on the left of": "bear/person, car/bus, motorcycle/bus, motorcycle/car, road/tree",
    "on the right of": "cone/cone, car/umbrella, phone/monitor, person/bear, bear/person",
    "behind": "motorcycle/person, person/person, building/trees, hydrant/motorcycle, trees/grass",
    "in the front of": "wheel/wheel, tower/train, truck/building, cat/vase, trash can/cabinet",
}


def with_article(noun: str) -> str:
    """`a cat`, `an ant`; by the first letter, which is right for every noun here."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def animals() -> tuple[str, ...]:
    """DDPO's `a(n) ANIMAL`."""
    return tuple(with_article(animal) for animal in ANIMALS)


def animals_activities() -> tuple[str, ...]:
    """DDPO's `a(n) ANIMAL ACTIVITY`, every combination."""
    return tuple(f"{animal} {activity}" for animal in animals() for activity in ACTIVITIES)


def template1_train() -> tuple[str, ...]:
    """`a(n) ANIMAL ACTIVITY`: fifteen animals for each activity.

    The released files say `a ant`; here it is `an ant`.
    """
    return tuple(f"{animal} {ACTIVITIES[i // 15]}" for i, animal in enumerate(animals()))


def template1_test() -> tuple[str, ...]:
    """Each animal with the two other activities."""
    trained = set(template1_train())
    return tuple(prompt for prompt in animals_activities() if prompt not in trained)


def template2_train() -> tuple[str, ...]:
    """`COLOUR FRUIT`: twenty fruit in two usual colours."""
    return tuple(f"{colour} {fruit}" for fruit, known in FRUIT.items() for colour in known[:2])


def template2_test() -> tuple[str, ...]:
    """The same fruit in an odd colour, and unseen vegetables in one."""
    odd = {fruit: colours[2] for fruit, colours in FRUIT.items()} | VEGETABLES
    return tuple(f"{colour} {food}" for food, colour in odd.items())


def template3_train() -> tuple[str, ...]:
    """`OBJECT PREDICATE OBJECT`, ten of each of four predicates.

    As the template is written, without articles: `chair under umbrella`.
    """
    return _relations(TRAIN_RELATIONS)


def template3_test() -> tuple[str, ...]:
    """Unseen pairs with the same predicates, and two unseen predicates; five of each."""
    return _relations(TEST_RELATIONS)


def _relations(table: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        f"{first} {predicate} {second}"
        for predicate, pairs in table.items()
        for first, second in (pair.split("/") for pair in pairs.split(", "))
    )


BUILT_IN: dict[str, Callable[[], tuple[str, ...]]] = {
    "template1.train": template1_train,
    "template1.test": template1_test,
    "template2.train": template2_train,
    "template2.test": template2_test,
    "template3.train": template3_train,
    "template3.test": template3_test,
    "animals": animals,
    "animals_activities": animals_activities,
}
