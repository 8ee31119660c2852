"""Other scripts: English prose with a little Chinese, Greek and emoji in training, tests of much.

Python ships next to no text in other scripts, so these are plain sentences made of words below, and names of emoji
from `unicodedata`. One noun in five and one emoji in ten, by its hash, is kept for tests: every sentence there has one.
"""

import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice

from pydantic import Field

from data_pipeline.section import Section
from experiments.tasks.library import samples_of, samples_up_to
from experiments.tasks.noise import prose
from experiments.tasks.writing import ComposedTask, Corpus, is_held_out, is_tested

# Of each sentence the words for each of its places, one after the other; nouns are in the last.
_CHINESE = (
    "今天 昨天 早上 晚上 上午 下午 春天 夏天 秋天 冬天",
    "我 你 他 她 我们 他们 老师 学生 妈妈 爸爸 朋友 医生 工人 孩子 邻居 姐姐",
    "看见了 买了 需要 找到了 带来了 拿走了 喜欢 送来了 借了 画了 忘了 想要",
    "一 两 三 四 五 六 七 八 九 十",
    "新 旧 大 小 红 白 黑 漂亮 普通 奇怪 干净 便宜",
    # A measure word and its noun.
    "本书 本词典 本杂志 支铅笔 支钢笔 张桌子 张照片 张地图 张票 把椅子 把雨伞 把钥匙 把刀 只猫 只鸟 只羊 "
    "只兔子 条鱼 条狗 条裤子 条河 件衬衫 件礼物 件大衣 辆汽车 辆火车 辆自行车 座山 座桥 座房子 棵树 朵花 "
    "个苹果 个西瓜 个杯子 个箱子 个问题 个故事 块石头 块手表 块面包 封信 首歌 部电影 部电话 台电脑 台机器 "
    "扇门 扇窗户 双鞋 双筷子 瓶牛奶 瓶水 杯茶 杯咖啡 碗米饭 碗汤 盏灯 面镜子 架飞机 艘船 匹马 头牛",
)
_GREEK = (
    "σήμερα χθες τώρα πάντα συχνά το_πρωί το_βράδυ το_καλοκαίρι το_χειμώνα",
    "ο_δάσκαλος ο_πατέρας ο_γιατρός ο_μαθητής ο_φίλος ο_γείτονας η_μητέρα η_αδελφή η_γιαγιά το_παιδί το_κορίτσι",
    "βλέπει αγοράζει θέλει βρίσκει κρατά φέρνει χάνει ζωγραφίζει δίνει παίρνει ψάχνει χρειάζεται",
    "δύο πέντε έξι επτά οκτώ εννέα δέκα έντεκα δώδεκα είκοσι",
    "βιβλία σπίτια δέντρα λουλούδια μήλα ψάρια πουλιά αυτοκίνητα τραπέζια παράθυρα κλειδιά ποτήρια γράμματα "
    "τραγούδια χρώματα παπούτσια ρολόγια κουτιά πλοία τρένα γάτες καρέκλες πόρτες ομπρέλες εικόνες λέξεις πέτρες "
    "γέφυρες εφημερίδες φωτογραφίες ιστορίες ερωτήσεις σκύλους δρόμους κήπους χάρτες καθρέφτες ποταμούς αριθμούς",
)
_EMOJI = (range(0x1F300, 0x1F650), range(0x1F680, 0x1F700), range(0x1F900, 0x1FA00))
_SENTENCES = 6  # of a document

Sentences = Callable[[bool, random.Random], Iterator[str]]


class ScriptsOptions(Section):
    """How much text of each kind; sizes are bytes of text."""

    train_bytes: int = Field(2_000_000, ge=1000, description="of the text to train on, about")
    share: float = Field(0.02, gt=0.0, lt=1.0, description="of it in other scripts, all together")
    held_out_bytes: int = Field(100_000, ge=1, description="of the text that is held out, at most")
    test_bytes: int = Field(20_000, ge=1, description="of each test")


def _chinese(tested: bool, rng: random.Random) -> Iterator[str]:
    for time, who, verb, number, adjective, noun in _filled(_CHINESE, tested, rng):
        yield f"{time}{who}{verb}{number}{noun[0]}{adjective}的{noun[1:]}。"


def _greek(tested: bool, rng: random.Random) -> Iterator[str]:
    for words in _filled(_GREEK, tested, rng):
        sentence = " ".join(words).replace("_", " ")
        yield sentence[0].upper() + sentence[1:] + ". "


def _filled(places: Sequence[str], tested: bool, rng: random.Random) -> Iterator[list[str]]:
    """A word for each place, over and over; the last is one that is kept for tests, or none of these."""
    *others, nouns = (words.split() for words in places)
    # Twice as many as by one hash, since there are few.
    kept = [noun for noun in nouns if (is_tested(noun) or is_tested(f"{noun}!")) == tested]
    while True:
        yield [rng.choice(words) for words in (*others, kept)]


def _emoji(tested: bool, rng: random.Random) -> Iterator[str]:
    named = [(name, sign) for name, sign in _named_emoji() if is_tested(sign) == tested]
    while True:
        name, sign = rng.choice(named)
        yield f"{name}: {sign * rng.randint(1, 3)}\n"


@cache
def _named_emoji() -> list[tuple[str, str]]:
    signs = [chr(code) for codes in _EMOJI for code in codes]
    return [(unicodedata.name(sign).lower(), sign) for sign in signs if unicodedata.category(sign) == "So"]


_SCRIPTS: dict[str, Sentences] = {"chinese": _chinese, "greek": _greek, "emoji": _emoji}


def _documents(script: str, tested: bool, seed: int) -> Iterator[str]:
    sentences = _SCRIPTS[script](tested, random.Random(f"{script} {tested} {seed}"))
    while True:
        yield "".join(islice(sentences, _SENTENCES))


def _compose(options: ScriptsOptions, seed: int) -> Corpus:
    english, tested_english = prose(seed)
    foreign = options.train_bytes * options.share
    plain = (text for text in english if not is_held_out({"text": text}))
    train = samples_of(plain, round(options.train_bytes - foreign), "task scripts, training")
    for script in _SCRIPTS:
        documents = (t for t in _documents(script, False, seed) if not is_held_out({"text": t}))
        train += samples_up_to(documents, round(foreign / len(_SCRIPTS)))
    random.Random(f"scripts {seed}").shuffle(train)
    tests = {name: samples_up_to(_documents(name, True, seed), options.test_bytes) for name in _SCRIPTS}
    tests["english"] = iter(samples_of(tested_english, options.test_bytes, "task scripts, test english"))
    held_out = samples_up_to((t for t in english if is_held_out({"text": t})), options.held_out_bytes)
    return Corpus(train, held_out, tests)


SCRIPTS = ComposedTask("scripts", ScriptsOptions, _compose)
