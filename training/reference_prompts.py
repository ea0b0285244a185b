"""A fixed set of short prompts about everything and nothing.

It does not know any task, and no task's data comes from it.
Read first: the locator measures every task against these prompts, so the set must never change within a repertoire;
adding a task must not move what older tasks are measured with.
"""

from __future__ import annotations

# Each kind is (frames, fillers): every frame is filled with every filler.
_KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (  # questions of knowledge
        ("What is {}?", "Explain {} to a child.", "Who first wrote about {}?", "Why does {} matter?"),
        (
            "photosynthesis",
            "the stock market",
            "gravity",
            "the French Revolution",
            "plate tectonics",
            "jazz",
            "inflation",
            "DNA",
        ),
    ),
    (  # instructions to write
        ("Write a short poem about {}.", "Give me three headlines on {}.", "Draft a speech praising {}."),
        ("autumn rain", "a lost dog", "night trains", "grandmothers", "mountains", "robots in love", "the sea"),
    ),
    (  # instructions on a text
        ("Summarise: {}", "Translate into French: {}", "Rewrite more politely: {}", "Is this positive or negative? {}"),
        (
            "The film was far too long for its story.",
            "You never call and the plants are dying.",
            "Our team won the cup after a goal in the last minute.",
            "Rain is expected in the north, with strong winds at night.",
        ),
    ),
    (  # small talk
        ("{}", "{} By the way, how are you?"),
        (
            "Good evening!",
            "I can't sleep again.",
            "My cat just learned to open doors.",
            "What a week it has been.",
            "Tell me something nice.",
            "Nice weather for a walk, isn't it?",
            "I just finished my exams.",
            "lol that's so true",
        ),
    ),
    (  # mathematics
        ("Calculate {}.", "{} = ?", "Solve step by step: {}"),
        (
            "17 * 23",
            "x + 4 = 11",
            "the square root of 196",
            "3/4 + 5/8",
            "12 percent of 250",
            "2^10 - 24",
            "sin(0) + cos(0)",
            "7! / 5!",
        ),
    ),
    (  # word problems
        ("{} How many are left?", "{} Show your reasoning."),
        (
            "A farmer has 12 hens and sells 5.",
            "Tom reads 30 pages a day of a book of 210 pages.",
            "A train covers 90 km in 45 minutes.",
            "Four friends share 18 marbles and lose two.",
        ),
    ),
    (  # code
        ("Write a Python function to {}.", "How do I {} in JavaScript?"),
        ("reverse a list", "parse a CSV file", "find the longest word", "count vowels", "merge two dictionaries"),
    ),
    (  # code to read
        ("What does this do? {}", "Find the bug: {}"),
        (
            "for i in range(10): print(i * i)",
            "SELECT name FROM users WHERE age > 30;",
            "int *p = NULL; *p = 4;",
            "git rebase -i HEAD~3",
            "<div class='box'><p>Hello</div>",
        ),
    ),
    (  # data
        ("{}", "Turn this into a sentence: {}"),
        (
            '{"id": 4, "name": "Ada", "tags": ["math", "engines"]}',
            "temperature,21.5,humidity,40",
            "name: test\non: push\njobs: []",
            "[1, 1, 2, 3, 5, 8]",
            "<note><to>Eve</to><body>Hi</body></note>",
            "a=1&b=two&c=%20",
        ),
    ),
    (  # lists and names
        ("List {}.", "Name five {}.", "Sort alphabetically: {}"),
        ("fruits that float", "rivers of Asia", "board games", "birds, ants, whales, cats", "rock bands of the 1970s"),
    ),
    (  # advice and how-to
        ("How do I {}?", "Give me tips to {}.", "Should I {} before going to bed?"),
        (
            "bake sourdough bread",
            "learn the violin",
            "stop worrying",
            "repair a bicycle tyre",
            "grow tomatoes",
            "meditate",
        ),
    ),
    (  # opinions and complaints about life
        ("{}", "Honestly, {}", "Do you agree that {}"),
        (
            "the neighbours play drums at midnight",
            "this city needs more trees",
            "my soup was cold and the waiter was rude",
            "phones are too big these days",
            "the new timetable is a joke",
        ),
    ),
    (  # facts with times and numbers
        ("{}", "True or false: {}"),
        (
            "The Titanic sank in April 1912.",
            "Easter is always on a Sunday.",
            "The shop is open from 9 to 17 on weekdays.",
            "Mount Everest is 8,849 metres high.",
            "In 1969 people first walked on the Moon.",
            "Water boils at 100 degrees.",
        ),
    ),
    (  # health, law and other serious matters
        ("What are the signs of {}?", "My friend asks about {}.", "Is {} dangerous?"),
        ("a concussion", "high blood pressure", "identity theft", "black mould", "a power cut", "food poisoning"),
    ),
    (  # role play and stories
        ("Pretend you are {}.", "Continue the story: {} opened the old door and", "Describe {} in two sentences."),
        ("a pirate captain", "a tired robot", "the king of the frogs", "a detective in Venice"),
    ),
    (  # messages and news
        ("{}", "What is this text about? {}"),
        (
            "URGENT! You have won a holiday, text WIN to 80086 now",
            "running 10 min late, save me a seat",
            "Central bank raises interest rates by half a point",
            "Patients who took the drug recovered two days sooner.",
            "Play some quiet piano music in the kitchen",
            "turn left then walk twice",
        ),
    ),
    (  # letters and choices
        ("Dear Sir or Madam, {}", "Reply to this e-mail: {}"),
        (
            "I am writing to apply for the position of gardener.",
            "we would like to invite you to our annual dinner.",
            "thank you for your kind words about our concert.",
            "the minutes of our meeting are attached.",
        ),
    ),
    (
        ("Which is better, {}?", "Compare {} in a table."),
        ("tea or wine", "Python or Rust", "living in a city or a village", "cats or dogs", "trains or planes"),
    ),
    (  # other languages
        ("{}",),
        (
            "Wie spät ist es jetzt in Tokio?",
            "Ich hätte gern ein Zimmer mit Blick aufs Meer.",
            "Où se trouve la gare la plus proche ?",
            "Raconte-moi une blague.",
            "¿Cuál es tu libro favorito?",
            "Mañana voy a la playa con mis primos.",
            "Qual é a capital do Brasil?",
            "Che tempo farà domani a Roma?",
            "Hoe oud is de oudste boom ter wereld?",
            "Jak dojść do muzeum?",
            "Hvor mange øyer har Norge?",
            "Bugün hava çok güzel.",
            "Сколько будет семь умножить на восемь?",
            "東京で一番高い建物は何ですか。",
            "请用一句话介绍你自己。",
            "오늘 저녁에 뭐 먹을까요?",
            "ما هي عاصمة مصر؟",
            "भारत का सबसे लंबा पुल कौन सा है?",
        ),
    ),
)


def reference_prompts() -> tuple[str, ...]:
    """About 300 different short prompts of many kinds and several languages, always the same, in a fixed order."""
    return tuple(frame.replace("{}", filler) for frames, fillers in _KINDS for frame in frames for filler in fillers)
