"""Names of a document's sections and its replies: common words of one sense, so that none is an attribute."""

SECTION_NAMES = tuple(
    "Falcon Heron Otter Badger Raven Lynx Tiger Panda Koala Moose Bison Camel Zebra Hyena Gecko Cobra "
    "Eagle Robin Finch Stork Swan Goose Crane Quail Trout Salmon Shark Whale Seal Walrus Beaver Ferret "
    "Rabbit Horse Donkey Goat Sheep Lamb Wolf Jackal Puma Jaguar Leopard Cheetah Gorilla Lemur Sloth Tapir "
    "Rhino Hippo Giraffe Gazelle Impala Ostrich Emu Parrot Toucan Condor Osprey Kestrel Magpie Sparrow "
    "Thrush Wren".split()
)
REPLIES = tuple(
    "maple cedar birch willow poplar walnut hazel almond cashew peanut ginger garlic onion carrot radish "
    "turnip celery lettuce spinach cabbage pepper tomato potato pumpkin melon lemon mango papaya guava "
    "banana apple pear peach apricot fig date grape raisin barley wheat oats rice millet maize lentil bean "
    "clover daisy tulip lily iris lotus orchid violet jasmine poppy thistle fern moss ivy basil thyme mint "
    "sage".split()
)
QUERIES = (
    "What is the right reply?",
    "Apply the rulebook to this picture.",
    "Which reply do the rules ask for?",
    "How should I answer here?",
)
assert len(set(SECTION_NAMES)) == len(set(REPLIES)) == 64
