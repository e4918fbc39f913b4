"""How people ask: the wordings of the questions of `abilities`, apart for training, validation and test.

{w} stands for a word, {l} for a letter, {e} for an expression, {n} for a dotted name; a word or letter may be quoted.
A model of this size understands little more than wordings close to those it was trained on, hence so many, and hence
the openings and endings that may stand around any question. The test's wordings of words, letters and facts were
written by somebody who had not read the others; those that happened to be equal, but for words like "please" and "the
word", were then left out.
"""

OPENINGS = (  # of some questions of the training side
    "Hi, ", "Hello! ", "Hey there, ", "Hey, ", "Good morning. ", "Good evening, ", "Hello again. ", "OK, ",
    "Okay, so ", "So, ", "Well, ", "And now: ", "Next question: ", "Another one: ", "One more thing: ",
    "By the way, ", "Alright, ", "Thanks. And ", "Great, thank you! ", "Quick question: ", "I have a question. ",
    "Sorry to bother you. ", "Can you help me? ", "Excuse me, ",
)  # fmt: skip
ENDINGS = (
    " Thanks!", " Thank you.", " Thanks a lot!", " Thank you very much!", " Many thanks in advance.",
    " Please help me.", " Please be quick.", " I'm in a hurry.", " I really need to know.", " It's for my homework.",
    " I forgot.", " I'm not sure about it.", " Just curious.", " Can you tell me?", " A short answer is fine.",
    " That would help me a lot.",
)  # fmt: skip
SPELL = {
    "train": (
        "How do you spell {w}?", "Spell {w}.", "Spell the word {w}.", "Please spell {w}.", "Can you spell {w}?",
        "What is the spelling of {w}?", "Spell out {w}.", "Write {w} letter by letter.",
        "What are the letters of {w}?", "Could you spell the word {w} for me?", "I need the spelling of {w}.",
        "List the letters of {w} in order.", "How is {w} spelled?", "Tell me how to spell {w}.",
        "Which letters make up the word {w}?", "{w}, spelled out?", "Could you spell {w} for me?",
        "Would you mind spelling {w}?", "How would you spell {w}?", "How does one spell {w}?",
        "How do I spell {w} correctly?", "I don't know how to spell {w}.",
        "I'm not sure how {w} is spelled, can you help?", "What's the right spelling of {w}?",
        "What's the spelling for {w}?", "Give me the spelling of {w}.", "Give me {w} one letter at a time.",
        "Break {w} into letters.", "Break the word {w} down into its letters, please.",
        "Split {w} into single letters.", "Separate the letters in {w}.", "Show me the letters in {w}.",
        "Show me how to spell {w}.", "Tell me how {w} is written.", "How is {w} written, letter for letter?",
        "How do you write {w}?", "What letters are in {w}?", "What letters does {w} have, from first to last?",
        "Which letters do I need to write {w}?", "Which letters spell {w}?", "I'd like {w} spelled out.",
        "I want to see {w} spelled.", "I keep misspelling {w}, how does it go?",
        "I always get {w} wrong when I write it, so spell it for me.", "The word is {w}. Spell it.",
        "The word {w}: what are its letters?", "{w}: letters please", "{w}, letter by letter, please.",
        "{w} - how is that spelled?", "Take the word {w} and list each of its letters.", "Name every letter of {w}.",
        "Say the letters of {w} one after another.", "For a school test I have to know how {w} is spelt.",
        "My daughter wants to know how to spell {w}.", "Let's spell {w} together.",
    ),
    "val": (
        "Write out the letters of {w}.", "Spell {w} one letter at a time.", "Tell me the letters of the word {w}.",
        "How do I spell the word {w}?",
    ),
    "test": (
        "Give me the letters in {w}, one at a time.", "Break the word {w} into its letters.",
        "Tell me every letter of {w} in order.", "I'd like to see {w} spelled out.",
        "If you had to spell {w} aloud, what would you say?", "{w} - what letters is it made of?",
    ),
}  # fmt: skip
COUNT = {
    "train": (
        "How many {l} are in {w}?", "How many {l} are there in {w}?", "Count the {l} in {w}.",
        "How many times does {l} appear in {w}?", "How often does {l} occur in {w}?", "Count how many {l} {w} has.",
        "How many times is the letter {l} in {w}?", "In {w}, how many {l} are there?", "How many {l} in {w}?",
        "Tell me how many {l} are in the word {w}.", "What is the number of {l} in {w}?",
        "Please count the letter {l} in the word {w}.", "How many letters {l} does {w} have?",
        "How many {l}s are in {w}?", "How many {l}'s are there in {w}?", "How many {l}'s does {w} have?",
        "How many {l}s does the word {w} contain?", "How many times is {l} used in {w}?",
        "How many times can you find {l} in {w}?", "How many times do you see the letter {l} in {w}?",
        "How many of the letters in {w} are {l}?", "How many letters {l} has {w} got?",
        "How often is there a {l} in {w}?", "How often do I write {l} when I write {w}?",
        "How often does the letter {l} come up in the word {w}?", "How frequently does {l} show up in {w}?",
        "Count how many {l}s {w} has.", "Count the letter {l} in {w}, please.", "Count up every {l} in the word {w}.",
        "Could you count the {l}'s in {w} for me?", "Please tell me how many {l}s you find in {w}.",
        "Tell me how often {l} is in {w}.", "Tell me the number of {l}'s in {w}.", "Give me the count of {l} in {w}.",
        "Find out how many {l}s the word {w} has.", "What's the count of the letter {l} in {w}?",
        "What's the total of {l}s in {w}?", "The number of {l}s in {w}?",
        "I'd like to know how many {l}'s are in {w}.", "I need to know how often {w} has the letter {l}.",
        "I can't tell how many {l}s there are in {w}.", "I'm wondering how many times {w} contains {l}.",
        "Does {w} have one {l} or more, and how many?", "Do you know how many {l}'s {w} is written with?",
        "Look at the word {w} and count its {l}s.", "Take {w}. How many times is the letter {l} in there?",
        "For the word {w}, count the {l}'s.", "In the word {w}, how often do you find {l}?", "{w} has how many {l}s?",
        "{w}: how many {l}'s?", "The word {w} contains the letter {l} how many times?", "Number of {l} in {w}",
        "My friend and I can't agree on how many {l}s are in {w}.",
    ),
    "val": (
        "Count the letters {l} in the word {w}.", "How many times do you find {l} in {w}?",
        "How many {l} does the word {w} have?", "How often is the letter {l} in the word {w}?",
        "Please tell me how many {l} there are in {w}.", "Count all {l} in the word {w}.",
        "How many times does the letter {l} occur in the word {w}?",
    ),
    "test": (
        "Can you tell me how many times {l} shows up in {w}?", "What is the number of {l}s in {w}?",
        "In the word {w}, how many letters are {l}?",
        "I want to know how many times you write {l} when you write {w}.",
        "Please check how many {l}s there are in {w}.", "Look at the word {w} and count each {l}.",
        "How many times do I need the letter {l} to write {w}?", "{w}: how many {l}s does it contain?",
        "Does {w} have any {l}s, and if so how many?",
    ),
}  # fmt: skip
FRAMES = {  # around "37*24" or "37 times 24"
    "train": (
        "What is {e}?", "{e}", "Calculate {e}.", "Compute {e}.", "How much is {e}?", "Please calculate {e}.",
        "What's {e}?", "Can you work out {e}?", "Tell me {e}.", "What does {e} equal?", "I need the result of {e}.",
        "What's the answer to {e}?", "What is the result of {e}?", "What is the value of {e}?",
        "What do you get for {e}?", "What do I get if I work out {e}?", "What would {e} be?",
        "What does {e} come to?", "What does {e} make?", "What number is {e}?", "How much does {e} make?",
        "How much would {e} be?", "How big is {e}?", "Could you calculate {e} for me?",
        "Could you tell me what {e} is?", "Can you do {e}?", "Can you compute {e}, please?",
        "Would you work out {e} for me?", "Do you know what {e} is?", "Please evaluate {e}.", "Please give me {e}.",
        "Evaluate {e}", "Work out {e}.", "Solve {e}.", "Figure out {e} for me.", "Find {e}.",
        "Find the value of {e}.", "Give me the answer to {e}.", "Give me the result for {e}, just the number.",
        "Tell me how much {e} is.", "Tell me the answer to {e}.", "Show me what {e} is.", "{e}, please.",
        "{e} is what?", "{e} equals what number?", "{e} makes how much?", "I want to know {e}.",
        "I'd like to know what {e} comes to.", "I can't do {e} in my head.", "My homework asks for {e}.",
    ),
    "val": (
        "How much does {e} equal?", "Work out what {e} is.", "Which number comes out of {e}?",
    ),
    "test": (
        "Tell me the value of {e}.", "Do you know what {e} comes to?", "Quick question: what's {e}?",
        "I'm trying to figure out {e}, can you help?", "{e} equals what?", "I need to know {e}.",
    ),
}  # fmt: skip
ORDERS = {  # around "multiply 37 by 24"
    "train": (
        "{e}.", "Please {e}.", "Can you {e}?", "{e} for me.", "{e} for me, would you?", "Could you {e}?",
        "Could you please {e} for me?", "Can you please {e}?", "Would you {e}?", "Will you {e} for me?",
        "Would you be so kind as to {e}?", "I want you to {e}.", "I'd like you to {e}.", "I need you to {e}, please.",
        "I have to {e}.", "I can't {e} without help.", "Help me {e}.", "Help me to {e}, please.", "Let's {e}.",
        "Now {e}.", "Just {e}.", "Go ahead and {e}.", "Try to {e}.", "Your task: {e}.", "What do I get if I {e}?",
        "What happens when you {e}?", "If you {e}, what is the result?", "{e} and tell me the answer.",
    ),
    "val": ("Try hard to {e}.", "Now, {e} quickly."),
    "test": (
        "Now {e} and tell me the result.", "What do you get if you {e}?", "Would you mind helping me {e}?",
    ),
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
        "What does {n} do?", "Explain {n}.", "What is {n}?", "What is {n} for?", "Describe {n}.",
        "Tell me about {n}.", "Tell me what {n} does.", "What do I use {n} for?", "Please explain {n}.", "{n}?",
        "What's {n}?", "What's {n} for?", "What exactly does {n} do?", "What does {n} do in Python?",
        "What's the purpose of {n}?", "What's the point of {n}?", "What is {n} good for?", "What is {n} used for?",
        "What can I do with {n}?", "What happens when I call {n}?", "What would I need {n} for?",
        "When should I use {n}?", "Why would anyone use {n}?", "How does {n} work?", "How would you describe {n}?",
        "Can you explain {n} to me?", "Could you tell me what {n} does?", "Do you know what {n} is for?",
        "Please explain what {n} does.", "Give me a short description of {n}.", "Give me a summary of {n}.",
        "Tell me what {n} is used for.", "Help me understand {n}.", "I don't understand {n}.",
        "I'd like to know what {n} does.", "I saw {n} in some code, what is it?",
        "I've never used {n}, what's it for?", "{n} does what?", "In Python, {n} is there for what?",
    ),
    "val": (
        "Explain to me what {n} does.", "What is the purpose of {n}?",
    ),
    "test": (
        "Say what {n} does.", "In Python, what does {n} do?", "I came across {n} in some code, what is it?",
        "When would I use {n}?", "Could you say in a sentence what {n} is for?",
        "I don't understand {n}, what's its purpose?",
    ),
}  # fmt: skip
