"""Generators of the demo model's text: recall tasks, short stories and questions about them.

Everything is a pure function of a seed. Seeds live in named streams ("eval", "train"), and the
public functions default to "eval", so that prompts made by tests, the demo command and the
evaluation are never rows that the model was trained on.

A recall task is a list of facts, one a line, and a question about one of them:

    - Mira: red kite
    - Tom: old drum
    Question: What does Mira have? Answer: red kite

Keys are drawn without replacement and values are drawn independently, so nothing but the prompt
itself can tell the answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


def _words(lines: str) -> tuple[str, ...]:
    return tuple(lines.split())


NAMES: tuple[str, ...] = _words(
    """
    Abel Ada Adam Agnes Alan Albert Alice Alma Amber Amos Amy Andy Anna Anton April Arlo Arthur Asher
    Astrid Aurora Ava Axel Barney Basil Beatrix Bella Ben Bertie Betty Bianca Billy Bonnie Boris Brad
    Brenda Bruno Byron Calvin Carl Carmen Casper Cecil Celia Chad Chloe Clara Clive Cora Cyril Daisy Dale
    Dan Daphne Daria David Dean Della Dennis Diana Dinah Dora Doris Doug Duncan Edgar Edith Edna Edwin
    Elena Eli Ella Elmer Elsa Emil Emma Enid Eric Erin Ernest Esme Ethan Eva Evan Faye Felix Fern Fiona
    Flora Floyd Frank Fred Freya Gail Gavin Gemma Gene George Gilda Gina Glen Gloria Gordon Grace Greta
    Gus Gwen Hal Hanna Harold Harry Hattie Hazel Heidi Helen Henry Herman Hilda Holly Homer Hope Howard
    Hugo Ian Ida Igor Ines Ingrid Irene Iris Irma Isaac Ivan Ivy Jack Jade James Jane Jasper Jay Jean
    Jenny Jesse Jill Joan Joel John Josie Joy Judy Julia June Kai Karen Karl Kate Keith Ken Kim Kira Kurt
    Lana Lara Lars Laura Leah Lena Leo Leroy Lewis Lila Lily Linda Lionel Lisa Lloyd Lola Lorna Lou Lucas
    Lucy Luke Luna Lydia Lyle Mabel Maria Mark Martha Marvin Mary Matt Maude Max Maya Megan Mia Mike Mila
    Miles Mina Mira Molly Mona Myra Nadia Nancy Nat Ned Neil Nell Nick Nina Noah Nora Norman Oliver Ophelia
    Orson Oscar Otis Otto Owen Paige Pam Pat Paul Pearl Penny Percy Peter Phil Piper Polly Quinn Ralph
    Ray Rex Rita Robin Rosa Roy Ruby Rufus Ruth Sally Sam Sara Scott Ted Tess Tim Toby Tom Vera Will Zoe
    """
)

ADJECTIVES: tuple[str, ...] = _words(
    """
    red blue green black white gold silver pink brown gray old new big tiny long short round flat soft
    hard warm cold clean dirty wet dry fast slow loud quiet light heavy shiny dull sweet sour plain fancy
    broken lost magic wooden paper glass stone iron wool secret
    """
)

THINGS: tuple[str, ...] = _words(
    """
    kite drum ball boat bell book cup hat coat key lamp map coin ring rope sled spoon fork plate bowl
    box bag basket blanket pillow chair table clock mirror candle pencil brush comb button scarf glove
    boot sock shirt belt whistle flute horn harp doll robot train truck wagon wheel ladder hammer bucket
    shovel broom flag tent lantern puzzle marble feather shell leaf jar
    """
)

ANIMALS: tuple[str, ...] = _words(
    "fox bear rabbit mouse cat dog duck frog pig goat hen owl deer horse lion tiger turtle squirrel"
)
TRAITS: tuple[str, ...] = _words("kind brave clever funny shy gentle happy little young wise")
PLACES: tuple[str, ...] = _words("forest river garden beach market hill farm park lake meadow cave village")
WEATHERS: tuple[str, ...] = _words("sunny rainy windy snowy cloudy foggy")
FOODS: tuple[str, ...] = _words("bread cheese soup cake honey apples berries nuts")
HIDING_PLACES: tuple[str, ...] = (
    "under a tree",
    "behind a rock",
    "in the tall grass",
    "near an old bridge",
    "inside a hollow log",
    "beside the path",
)
SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "Answer the question.",
    "You tell stories and answer questions.",
)


@dataclass(frozen=True)
class RecallTask:
    """Facts, a question about one of them and the only right answer."""

    facts: tuple[tuple[str, str], ...]  # (key, value) in the order of the prompt
    key: str  # the key that is asked about
    answer: str  # its value, without a leading space

    @property
    def question(self) -> str:
        return f"What does {self.key} have?"

    @property
    def facts_text(self) -> str:
        """The facts as lines, each with its newline: the part that questions can share as a prefix."""
        return "".join(f"- {key}: {value}\n" for key, value in self.facts)

    @property
    def prompt(self) -> str:
        """The raw completion prompt; the model continues it with " answer" and the eos token."""
        return self.facts_text + raw_question(self.question)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat form; the model replies with "answer" and the eos token."""
        return [{"role": "user", "content": self.facts_text + self.question}]


@dataclass(frozen=True)
class Story:
    """A short story with questions that it answers."""

    text: str
    request: str  # a chat request that this story fulfils
    questions: tuple[tuple[str, str], ...]  # (question, answer)


def stream(seed: int | str, name: str = "eval") -> random.Random:
    """The random stream of a seed in a named family; families never share their numbers."""
    return random.Random(f"{name}/{seed}")


def raw_question(question: str) -> str:
    """The raw completion form of a question, up to where the answer starts."""
    return f"Question: {question} Answer:"


def recall_tasks(seed: int | str, num_facts: int, num_questions: int, stream_name: str = "eval") -> list[RecallTask]:
    """Questions about different facts of one shared list.

    num_facts is at most len(NAMES), and num_questions is at most num_facts.
    """
    rng = stream(seed, stream_name)
    facts = tuple((name, f"{rng.choice(ADJECTIVES)} {rng.choice(THINGS)}") for name in rng.sample(NAMES, num_facts))
    return [RecallTask(facts, key, answer) for key, answer in rng.sample(facts, num_questions)]


def recall_prompt(seed: int | str, num_facts: int) -> RecallTask:
    """One recall task: a list of facts and a question about a random one. About 6 tokens a fact."""
    return recall_tasks(seed, num_facts, 1)[0]


def story_prompt(seed: int | str) -> str:
    """The first sentence of a story, for the model to continue: "Once upon a time there was ..."."""
    return story(seed).text.partition(".")[0] + "."


def story_question(seed: int | str) -> tuple[Story, str, str]:
    """A story, a question about it and the answer."""
    tale = story(seed)
    question, answer = stream(f"{seed}/question").choice(tale.questions)
    return tale, question, answer


def story(seed: int | str, stream_name: str = "eval") -> Story:
    """A random story of five to eight sentences."""
    rng = stream(seed, stream_name)
    hero, friend = rng.sample(NAMES, 2)
    animal, friend_animal = rng.sample(ANIMALS, 2)
    trait, place = rng.choice(TRAITS), rng.choice(PLACES)
    opening = f"Once upon a time there was a {trait} {animal} named {hero}."
    walk = f"One {rng.choice(WEATHERS)} day, {hero} went to the {place}."
    plot = rng.choice((_lost_thing, _shared_food, _new_game))
    middle, questions = plot(rng, hero, friend, friend_animal)
    ending = rng.choice(
        (
            f"{hero} and {friend} were friends from that day on.",
            f"{hero} was happy, and {friend} was happy too.",
            f"Then {hero} and {friend} walked home together.",
        )
    )
    return Story(
        text=" ".join((opening, walk, *middle, ending, "The end.")),
        request=rng.choice(
            (
                "Tell me a story.",
                f"Tell me a story about {hero}.",
                f"Tell me a story about {hero} the {animal}.",
            )
        ),
        questions=(
            (f"Where did {hero} go?", f"the {place}"),
            (f"What was {hero}?", f"a {animal}"),
            (f"Who did {hero} meet?", f"it was {friend}"),
            (f"What was {friend}?", f"a {friend_animal}"),
            *questions,
        ),
    )


Plot = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]


def _lost_thing(rng: random.Random, hero: str, friend: str, friend_animal: str) -> Plot:
    """The hero loses a thing and the friend finds it: sentences, and questions with answers."""
    adjective, thing, where = rng.choice(ADJECTIVES), rng.choice(THINGS), rng.choice(HIDING_PLACES)
    sentences = (
        f"{hero} was sad because the {adjective} {thing} was gone.",
        f"Soon {hero} met a {friend_animal} named {friend}.",
        f'"I lost my {thing}," said {hero}. "Can you help me?"',
        f"They looked everywhere, and {friend} found the {thing} {where}.",
        f'"Thank you, {friend}!" said {hero}.',
    )
    questions = (
        (f"What did {hero} lose?", f"the {adjective} {thing}"),
        (f"Who found the {thing}?", f"it was {friend}"),
        (f"Where was the {thing}?", where),
    )
    return sentences, questions


def _shared_food(rng: random.Random, hero: str, friend: str, friend_animal: str) -> Plot:
    """The hero shares food with the hungry friend: sentences, and questions with answers."""
    food, where = rng.choice(FOODS), rng.choice(HIDING_PLACES)
    sentences = (
        f"{hero} had some {food} in a {rng.choice(('basket', 'bag', 'box'))}.",
        f"There {hero} saw a {friend_animal} {where}.",
        f'"My name is {friend}, and I am very hungry," said the {friend_animal}.',
        f"So {hero} gave {friend} half of the {food}.",
        f'"You are so kind, {hero}!" said {friend}.',
    )
    questions = (
        (f"What did {hero} have?", food),
        ("Who was hungry?", f"it was {friend}"),
        (f"Where was {friend}?", where),
    )
    return sentences, questions


def _new_game(rng: random.Random, hero: str, friend: str, friend_animal: str) -> Plot:
    """The friend teaches the hero to play with a thing: sentences, and questions with answers."""
    adjective, thing = rng.choice(ADJECTIVES), rng.choice(THINGS)
    first, second = rng.sample(("scared", "tired", "bored", "curious", "cold", "lonely"), 2)
    sentences = (
        f"{hero} was {first} and a bit {second}.",
        f"Then {hero} met {friend} the {friend_animal}.",
        f'"Look, I made a {adjective} {thing}!" said {friend}. "Do you want to play with it?"',
        f"They played with the {thing} until it was dark.",
        f'"That was fun," said {hero}.',
    )
    questions = (
        (f"What did {friend} make?", f"a {adjective} {thing}"),
        (f"Who made the {thing}?", f"it was {friend}"),
        (f"How did {hero} feel?", f"{first} and a bit {second}"),
    )
    return sentences, questions
