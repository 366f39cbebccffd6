"""A few invented items of each evaluation task, in its public format."""

_CHOICES = {"text": ["a red bird", "the cat on a mat", "one old tree é", "a"], "label": ["A", "B", "C", "D"]}
_NUMBERED = {"text": ["bird", "a small cat", "tree"], "label": ["1", "2", "3"]}


def _arc(question, answer):
    return {"id": "x", "question": question, "choices": _NUMBERED if answer.isdigit() else _CHOICES, "answerKey": answer}


ITEMS = {
    "hellaswag": [
        {
            "activity_label": "Sitting",
            "ctx_a": "The cat [header] saw  one bird.",
            "ctx_b": "the bird",
            "endings": ["sat [title] on a mat.", "saw that tree. [step] And a cat.", " and one", "in that old red tree é"],
            "label": str(label),
        }
        for label in (0, 1, 3)
    ],
    "arc_easy": [_arc("What sat?", "B"), _arc("Who saw one bird?", "1"), _arc("What is red?", "C")],
    "arc_challenge": [_arc("What is old?", "3"), _arc("What sat on a mat?", "D")],
    "piqa": [
        {"goal": "Find a bird", "sol1": "look in that tree", "sol2": "sit on a mat and see", "label": label} for label in (0, 1)
    ],
    "winogrande": [
        {"sentence": "The cat saw a bird, and the _ sat on a mat.", "option1": "cat", "option2": "bird", "answer": answer}
        for answer in ("1", "2")
    ],
    "boolq": [{"passage": "A cat sat.", "question": "did a cat sit", "label": label} for label in (0, 1)],
    "openbookqa": [{"question_stem": "The old tree", "choices": _CHOICES, "answerKey": answer} for answer in "AB"],
    "copa": [
        {
            "premise": "The cat sat.",
            "question": question,
            "choice1": "It saw a bird.",
            "choice2": "The tree was old.",
            "label": 1,
        }
        for question in ("cause", "effect")
    ],
    "sciq": [
        {
            "support": " A cat sat.",
            "question": "Who sat?",
            "distractor1": "a bird",
            "distractor2": "one tree",
            "distractor3": "that mat",
            "correct_answer": answer,
        }
        for answer in ("a cat", "the small cat")
    ],
    "commonsense_qa": [
        {
            "question": " Where is a bird? ",
            "choices": {"text": ["tree", "mat", "cat", "sun", "sea"], "label": list("ABCDE")},
            "answerKey": answer,
        }
        for answer in "AE"
    ],
    "social_iqa": [
        {"context": "A cat sat.", "question": "Why?", "answerA": "to see", "answerB": "a mat", "answerC": "and", "label": label}
        for label in ("1", "3")
    ],
    "swag": [
        {
            "startphrase": "The cat",
            "ending0": "sat",
            "ending1": "saw a bird",
            "ending2": "on",
            "ending3": "one red",
            "label": label,
        }
        for label in (1, 2)
    ],
    "mmlu": [
        {"question": " What sat? ", "choices": ["cat", "bird", "tree", "mat"], "answer": answer, "subject": "x"}
        for answer in (0, 2)
    ],
}
