"""How people ask: the wordings of the questions of `abilities`, apart for training, validation and test.

{w} stands for a word, {l} for a letter, {e} for an expression, {n} for a dotted name; a word or letter may be quoted.
A model of this size understands little more than wordings close to those it was trained on, hence so many.
"""

SPELL = {
    "train": (
        "How do you spell {w}?", "Spell {w}.", "Spell the word {w}.", "Please spell {w}.", "Can you spell {w}?",
        "What is the spelling of {w}?", "Spell out {w}.", "Write {w} letter by letter.", "What are the letters of {w}?",
        "Could you spell the word {w} for me?", "I need the spelling of {w}.", "List the letters of {w} in order.",
        "How is {w} spelled?", "Tell me how to spell {w}.", "Which letters make up the word {w}?", "{w}, spelled out?",
        "Spell {w} with spaces between the letters.", "Spell the word {w}, one letter after the other.",
        "Spell {w} letter by letter.", "Write the word {w} one letter at a time.", "Say the letters of {w} one by one.",
        "Spell {w} for me, please.", "Give me the letters of {w}.", "What letters does the word {w} consist of?",
    ),
    "val": ("How is the word {w} spelled?", "Write out the letters of {w}.", "Please spell the word {w} for me."),
    "test": (
        "Would you spell {w} for me?", "Please give the spelling of the word {w}.", "Spell {w} one letter at a time.",
        "How would you spell {w}?", "Tell me the letters of the word {w}.", "How do I spell the word {w}?",
    ),
}  # fmt: skip
COUNT = {
    "train": (
        "How many {l} are in {w}?", "How many {l} are there in {w}?", "Count the {l} in {w}.",
        "How many times does {l} appear in {w}?", "How often does {l} occur in {w}?", "Count how many {l} {w} has.",
        "How many times is the letter {l} in {w}?", "In {w}, how many {l} are there?", "How many {l} in {w}?",
        "Tell me how many {l} are in the word {w}.", "What is the number of {l} in {w}?",
        "Please count the letter {l} in the word {w}.", "How many letters {l} does {w} have?",
        "How often is {l} in {w}?", "How often does the word {w} contain {l}?", "Count every {l} in {w}.",
        "How often do you see {l} in the word {w}?", "How many {l} does {w} contain?", "The word {w} has how many {l}?",
    ),
    "val": ("Count the letters {l} in the word {w}.", "How many times do you find {l} in {w}?"),
    "test": (
        "How many {l} does the word {w} have?", "How often is the letter {l} in the word {w}?",
        "Please tell me how many {l} there are in {w}.", "Count all {l} in the word {w}.",
        "How many times does the letter {l} occur in the word {w}?",
    ),
}  # fmt: skip
FRAMES = {  # around "37*24" or "37 times 24"
    "train": (
        "What is {e}?", "What is {e}?", "{e}", "{e} = ?", "Calculate {e}.", "Compute {e}.", "How much is {e}?",
        "Please calculate {e}.", "What's {e}?", "Can you work out {e}?", "Tell me {e}.", "What does {e} equal?",
        "I need the result of {e}.", "{e}, please.", "Please tell me the result of {e}.", "What do I get for {e}?",
        "Could you calculate {e} for me?", "Evaluate {e}.", "How much do you get for {e}?", "Work out {e} for me.",
        "What is the value of {e}?", "Do you know what {e} is?", "Can you tell me how much {e} is?",
        "I want to know what {e} comes to.", "Solve {e}.", "Give me {e}.", "Find {e} with your calculator.",
    ),
    "val": ("Please work out {e}.", "How much does {e} equal?"),
    "test": (
        "Tell me what {e} is.", "Can you calculate {e}?", "What is the result of {e}?", "Please compute {e} for me.",
        "Could you tell me how much {e} is?", "What do you get for {e}?",
    ),
}  # fmt: skip
ORDERS = {  # around "multiply 37 by 24"
    "train": (
        "{e}.", "Please {e}.", "Can you {e}?", "{e} for me.", "Would you {e}, please?", "I would like you to {e}.",
        "Could you please {e} for me?", "You should {e}.", "{e} and tell me the result.", "I need you to {e}.",
    ),
    "val": ("Now {e}.",),
    "test": ("Could you {e}?", "Please {e} for me.", "I want you to {e}."),
}  # fmt: skip
WORDINGS = {  # (for FRAMES, for ORDERS): the same in all splits, like the signs; what differs is what stands around
    "+": (("{a} plus {b}", "the sum of {a} and {b}"), ("add {a} and {b}", "add {b} to {a}")),
    "-": (("{a} minus {b}", "the difference of {a} and {b}"), ("subtract {b} from {a}", "take {b} away from {a}")),
    "*": (
        ("{a} times {b}", "the product of {a} and {b}", "{a} x {b}"),
        ("multiply {a} by {b}", "multiply {a} and {b}"),
    ),
    "/": (("{a} divided by {b}", "{a} over {b}"), ("divide {a} by {b}",)),
}
EXPLAIN = {
    "train": (
        "What does {n} do?", "What does {n} do?", "Explain {n}.", "What is {n}?", "What is {n} for?", "Describe {n}.",
        "Tell me about {n}.", "Tell me what {n} does.", "What do I use {n} for?", "Please explain {n}.", "{n}?",
        "What is {n} good for?", "How would you describe {n}?", "In Python, what is {n}?",
        "What happens when I call {n}?", "Can you tell me what {n} does?", "What does the function {n} do?",
    ),
    "val": ("Explain to me what {n} does.", "What is the purpose of {n}?"),
    "test": ("Can you explain {n}?", "In Python, what does {n} do?", "What is {n} used for?", "Say what {n} does."),
}  # fmt: skip
