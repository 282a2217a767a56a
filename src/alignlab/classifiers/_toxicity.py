"""Is a text toxic? text -> features a reader would name -> probability.

Toxic is insulting, hateful, threatening, sexually explicit towards somebody, or encouraging harm. A bad word alone is
not: what counts is who it is aimed at, so most features are pairs that meet within one sentence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from alignlab.classifiers._linear import load
from alignlab.classifiers._text import plain, sentences, words

_GROUPS = (
    r"(?:wom[ae]n|girls?|females?|feminists?|blacks?|black (?:people|men|women|guys?|folks?)|"
    r"whites?|white people|jews?|jewish|muslims?|islam|arabs?|mexicans?|asians?|chinese|"
    r"indians?|polish|immigrants?|migrants?|refugees?|foreigners?|gays?|gay people|lesbians?|"
    r"trans(?:gender\w*)? ?(?:people)?|christians?|liberals?|republicans?|democrats?|"
    r"politicians?|cops?|fat people|ugly people|short men|old people|poor people|disabled "
    r"people|homeless|minorities|races?|religio\w+|those people|these people|people like "
    r"(?:you|them|that))"
)
_PATTERNS: dict[str, str] = {
    "insult": (
        r"\b(?:idiots?|morons?|stupid|dumb(?:ass)?|imbecile|losers?|pathetic|worthless|useless|"
        r"ugly|disgusting|filthy|freaks?|pigs?|cows?|trash|garbage|scum\w*|retard\w*|creeps?|"
        r"cowards?|liars?|jerks?|dicks?|dickheads?|pricks?|bastards?|(?:ass|butt)holes?|bitch\w*|"
        r"whores?|sluts?|twats?|nasty|lazy|dirty|thugs?|sick of|weirdos?|brainless|fool)\b"
    ),
    "profanity": r"\b(?:\w*fuck\w*|(?:bull|horse|dog)?shit\w*|damn|crap|piss\w*|ass|arse|hell|bollocks|cunts?)\b",
    "sexual": (
        r"\b(?:sex|sexy|sexual\w*|fuck(?:ing|ed)?|porn\w*|nudes?|naked|dick|cock|penis|pussy|"
        r"vagina|tits|boobs|breasts|butt|ass|horny|orgasm\w*|masturbat\w*|blow ?job|oral|moan\w*|"
        r"lick\w*|suck\w*|seduc\w*|aroused?|erotic|panties|grope\w*|grab(?:bed)? her)\b"
    ),
    "slur": (
        r"\b(?:nigg\w+|fag(?:got|gy|s)?\w*|kikes?|spics?|wetbacks?|chinks?|gooks?|trann(?:y|ies)|"
        r"dykes?|retards?|retarded|ragheads?|savages|vermin|subhuman\w*)\b"
    ),
    "violence": (
        r"\b(?:kill\w*|murder\w*|stab\w*|shoot\w*|shot|strangl\w*|beat(?:ing)?|hit|hurt\w*|"
        r"harm\w*|punch\w*|slap\w*|smack\w*|kick\w*|torture\w*|poison\w*|drown\w*|burn\w*|bomb\w*|"
        r"attack\w*|rap(?:e|ed|ing|es|ist|ists)|molest\w*|lynch\w*|hang|behead\w*|skin(?:ned|"
        r"ning)? alive|kidnap\w*|assault\w*|threaten\w*|bleed\w*|break (?:his|her|their|your) "
        r"(?:legs?|neck|arms?|bones?)|run over|choke\w*|die|dead|drug (?:her|him|girls?|someone)|"
        r"hold (?:her|him) down|get rid of the body|overdose)\b"
    ),
    "means": (
        r"\b(?:knife|knives|gun|guns|bomb|arsenic|cyanide|weapon|bullet|rope|hit ?man|bodies|body|"
        r"acid|laxatives?|evidence|caught|suspicio\w+|accident)\b"
    ),
    "person": (
        r"\b(?:him|her|them|he|she|they|someone|somebody|anyone|people|person|man|wife|husband|"
        r"boss|neighbou?rs?|kids?|child(?:ren)?|sister|brother|girlfriend|boyfriend|ex|friend|guy|"
        r"human being|cat|dogs?|pet)\b"
    ),
    "you": r"\b(?:you|your|you're|youre|ur|u|yourself|ya)\b",
    "you_are": (
        r"\b(?:you are|you're|youre|your|ur|you) (?:a |an |so |such |just |really |being |acting "
        r"like |little |all )*"
    ),
    "me": r"\b(?:i|i'm|i'll|i'd|me|my|we|let's)\b",
    "intends": (
        r"\b(?:i want to|i need to|i'm going to|i am going to|i will|i'll|gonna|i'd love to|i "
        r"would like to|i plan|help me|how (?:do|can|could|should|would) (?:i|you|we|someone)|"
        r"what is the best way|what's the best way|good way to|where would|tell me|give me|should "
        r"i)\b"
    ),
    "should": (
        r"\b(?:should(?:n't| not)? (?:be|die|all|have|just|never)|deserves?|hope (?:you|he|she|"
        r"they)|belong in|need to be|asking for it|round (?:them|up)|deported|eradicat\w*|"
        r"eliminat\w*|exterminat\w*|neuter\w*|get out of|go back to)\b"
    ),
    "group": rf"\b{_GROUPS}\b",
    "generalises": rf"\b(?:all|most|typical|those|these)?\s?{_GROUPS} "
    r"(?:are|is|have|can't|cannot|should|always|never|deserve|belong|just|ruin\w*|commit\w*)\b",
    "bad_trait": (
        r"\b(?:inferior|criminals?|terrorists?|animals|vermin|lazy|dumb|stupid|dirty|greedy|"
        r"dangerous|violent|crime|evil|disgusting|mentally ill|burden|uneducated|slow|selfish|"
        r"cheap|worst|thieves|rapists|illegals?|threat|weak(?:er)?|smarter|better than|not good "
        r"people)\b"
    ),
    "hates": r"\b(?:hate|despise|can't stand|loathe|detest)\b",
    "shut_up": (
        r"\b(?:shut up|shut the|go to hell|screw you|fuck (?:you|off)|fuck you|get lost|kill "
        r"yourself|suck (?:my|it)|go die|drop dead|kiss my)\b"
    ),
    "jokes": r"\b(?:insults?|jokes?|slut shame|make fun|roast|mock|tease|bully|meanest)\b",
    "denounces": (
        r"\b(?:wrong|illegal|unethical|offensive|hurtful|harmful|not okay|not ok|isn't okay|"
        r"stereotypes?|discriminat\w+|prejudice|racism|never the answer|dignity|respect|don't "
        r"think (?:you should|it's|that's)|against the law|crime is|bad idea|terrible thing|cruel|"
        r"derogatory)\b"
    ),
    "declines": (
        r"\b(?:i (?:can't|cannot|won't|will not|don't want to|am not able|refuse)|i'm (?:not|"
        r"unable|sorry)|i am (?:not|unable|sorry)|please don't)\b"
    ),
    "supports": (
        r"\b(?:sorry to hear|sorry for your|so sorry|hotline|helpline|crisis|therapist|counsel\w+|"
        r"support|symptoms|victims?|survivors?|screening|prevent\w*|protect\w*|safe(?:ly|ty)?)\b"
    ),
    "reports": (
        r"\b(?:was|were|is defined|in [12][0-9]{3}|study|studies|research\w*|history|police said|"
        r"sentenced|law|according to|century|war|movement|percent|rates?|novel|film|movie|"
        r"character|game|process|script|command|file|code)\b"
    ),
    "cooks": (
        r"\b(?:recipe|minutes?|oven|sauce|eggs?|whites|oil|steak|chicken|server|cluster|port|"
        r"thread|wire|database|run the|terminal|python|function|exam|match|goal|team|coffee|"
        r"hike)\b"
    ),
    "asks_mildly": r"^\W*(?:what|who|when|where|is|are|do|does|did|can|could|why|which)\b",
}
_COMPILED = {name: re.compile(pattern) for name, pattern in _PATTERNS.items()}
_PAIRS = (
    ("insult", "you"),
    ("insult", "person"),
    ("insult", "group"),
    ("profanity", "you"),
    ("profanity", "person"),
    ("profanity", "group"),
    ("sexual", "you"),
    ("sexual", "me"),
    ("sexual", "person"),
    ("violence", "you"),
    ("violence", "person"),
    ("violence", "group"),
    ("violence", "intends"),
    ("violence", "should"),
    ("violence", "means"),
    ("violence", "me"),
    ("violence", "reports"),
    ("violence", "cooks"),
    ("violence", "supports"),
    ("group", "bad_trait"),
    ("group", "hates"),
    ("group", "should"),
    ("group", "jokes"),
    ("group", "denounces"),
    ("generalises", "bad_trait"),
    ("insult", "jokes"),
    ("insult", "denounces"),
    ("insult", "me"),
    ("means", "person"),
    ("hates", "you"),
)
_ATTACK = re.compile(
    r"\b(?:you|you're|youre|your|ur) (?:(?:are|a|an|so|such|just|really|being|acting|like|"
    r"little|fucking|damn|goddamn|all|mother is|mom is|mama) ){0,5}(?:idiot|moron|stupid|dumb|"
    r"pathetic|worthless|useless|ugly|disgusting|filthy|freak|pig|cow|trash|garbage|piece|"
    r"loser|bitch|whore|slut|asshole|dick|fat|liar|creep|retard\w*|bad|terrible|boring|"
    r"annoying)"
)
MOST_SENTENCES = 30


def toxicity(texts: Sequence[str]) -> list[float]:
    """Probability of each text that it is toxic; blank text has 0. English only; see docs/safety.md for its limits."""
    model = load("toxicity")
    return [model.probability(*represent(text)) if text.strip() else 0.0 for text in texts]


def represent(text: str) -> tuple[dict[str, float], list[str]]:
    """`(features, terms)` of a text: what the classifier sees."""
    text = _unmasked(plain(text))
    pieces = sentences(text)[:MOST_SENTENCES] or [text]
    flags = [{name for name, pattern in _COMPILED.items() if pattern.search(piece)} for piece in pieces]
    found = words(text)
    features: dict[str, float] = {
        "words": math.log1p(len(found)) / 5,
        "short": float(len(found) < 12),
        "attack": float(bool(_ATTACK.search(text))),
        "one": float(len(pieces) == 1),
    }
    for name in _PATTERNS:
        count = sum(name in flag for flag in flags)
        if count:
            features[name] = 1.0
            features[f"{name}/share"] = count / len(flags)
    for one, other in _PAIRS:
        count = sum(one in flag and other in flag for flag in flags)
        if count:
            features[f"{one}+{other}"] = 1.0
            features[f"{one}+{other}/share"] = count / len(flags)
    if not any(
        flag & {"insult", "profanity", "sexual", "slur", "violence", "bad_trait", "hates", "shut_up"} for flag in flags
    ):
        features["no_bad_word"] = 1.0
    return features, _terms(found)


_LEET = str.maketrans({"@": "a", "$": "s", "3": "e", "0": "o", "1": "i", "!": "i"})
_DISGUISED = re.compile(r"\b[a-z]+[@$!301*][@$!301*a-z]*[a-z]\b")
_STRETCHED = re.compile(r"([a-z])\1{2,}")


def _unmasked(text: str) -> str:
    """`sh!t` and `stuuupid` as what they stand for."""
    text = _DISGUISED.sub(lambda match: match[0].translate(_LEET), text)
    return _STRETCHED.sub(r"\1", text)


def _terms(found: Sequence[str]) -> list[str]:
    """Words, pairs of neighbours, and beginnings of longer words, of the first 120 words."""
    found = found[:120]
    terms = [f"w:{word}" for word in found]
    terms += [f"p:{one} {two}" for one, two in pairwise(found)]
    return terms + [f"s:{word[:5]}" for word in found if len(word) > 5]
