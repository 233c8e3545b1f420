"""Words for the demo scenes in six languages, with what the grammar has to know of each.

German nouns: gender (their singular takes no ending in the cases used). French: gender. Czech: gender
("m" inanimate, "ma" animate, "f", "n") and the nominative, genitive, accusative and instrumental singular.
Japanese: whether the noun is alive (います, not あります) and its counter. Chinese: its measure word.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """One object kind in six languages."""

    en: str
    de: str
    de_gender: str
    fr: str
    fr_gender: str
    cs_gender: str
    cs: tuple[str, str, str, str]
    ja: str
    ja_counter: str
    zh_measure: str
    zh: str
    alive: bool = False


@dataclass(frozen=True)
class Adjective:
    """A colour or size: stems for de and cs, both genders for fr; ja is the noun and the attributive form."""

    en: str
    de: str
    fr: tuple[str, str]
    cs: str
    ja: tuple[str, str]
    zh: str


def _nouns(table: str) -> dict[str, Noun]:
    """Reads a kind a line: en; de gender; fr gender; cs gender and four cases; ja; zh; "alive"."""
    nouns = {}
    for line in table.strip().splitlines():
        en, de, fr, cs, ja, zh, *alive = [cell.split() for cell in line.split(";")]
        nouns[en[0]] = Noun(en[0], de[0], de[1], fr[0], fr[1], cs[0], tuple(cs[1:]), *ja, *zh, bool(alive))
    return nouns


NOUNS = _nouns(
    """
    ball; Ball m; ballon m; m míč míče míč míčem; ボール つ; 个 球
    house; Haus n; maison f; m dům domu dům domem; 家 軒; 座 房子
    tree; Baum m; arbre m; m strom stromu strom stromem; 木 本; 棵 树
    car; Auto n; voiture f; n auto auta auto autem; 車 台; 辆 汽车
    fish; Fisch m; poisson m; f ryba ryby rybu rybou; 魚 匹; 条 鱼; alive
    star; Stern m; étoile f; f hvězda hvězdy hvězdu hvězdou; 星 つ; 颗 星星
    cup; Tasse f; tasse f; m hrnek hrnku hrnek hrnkem; カップ つ; 个 杯子
    chair; Stuhl m; chaise f; f židle židle židli židlí; 椅子 つ; 把 椅子
    flower; Blume f; fleur f; f květina květiny květinu květinou; 花 本; 朵 花
    boat; Boot n; bateau m; f loďka loďky loďku loďkou; 船 つ; 艘 船
    umbrella; Regenschirm m; parapluie m; m deštník deštníku deštník deštníkem; 傘 本; 把 雨伞
    hat; Hut m; chapeau m; m klobouk klobouku klobouk kloboukem; 帽子 つ; 顶 帽子
    bell; Glocke f; cloche f; m zvon zvonu zvon zvonem; 鐘 つ; 口 钟
    kite; Drachen m; cerf-volant m; ma drak draka draka drakem; 凧 つ; 只 风筝
    book; Buch n; livre m; f kniha knihy knihu knihou; 本 冊; 本 书
    key; Schlüssel m; clé f; m klíč klíče klíč klíčem; 鍵 つ; 把 钥匙
    mushroom; Pilz m; champignon m; f houba houby houbu houbou; キノコ つ; 个 蘑菇
    ladder; Leiter f; échelle f; m žebřík žebříku žebřík žebříkem; はしご つ; 架 梯子
    apple; Apfel m; pomme f; n jablko jablka jablko jablkem; りんご つ; 个 苹果
    bird; Vogel m; oiseau m; ma pták ptáka ptáka ptákem; 鳥 羽; 只 鸟; alive
    cat; Katze f; chat m; f kočka kočky kočku kočkou; 猫 匹; 只 猫; alive
    butterfly; Schmetterling m; papillon m; ma motýl motýla motýla motýlem; 蝶 匹; 只 蝴蝶; alive
    heart; Herz n; cœur m; n srdce srdce srdce srdcem; ハート つ; 颗 爱心
    lamp; Lampe f; lampe f; f lampa lampy lampu lampou; ランプ つ; 盏 灯
    """
)

COLOUR_WORDS = {
    "red": Adjective("red", "rot", ("rouge", "rouge"), "červen", ("赤", "赤い"), "红色"),
    "blue": Adjective("blue", "blau", ("bleu", "bleue"), "modr", ("青", "青い"), "蓝色"),
    "green": Adjective("green", "grün", ("vert", "verte"), "zelen", ("緑", "緑の"), "绿色"),
    "yellow": Adjective("yellow", "gelb", ("jaune", "jaune"), "žlut", ("黄色", "黄色い"), "黄色"),
    "orange": Adjective(
        "orange", "orangefarben", ("orange", "orange"), "oranžov", ("オレンジ", "オレンジの"), "橙色"
    ),
    "purple": Adjective("purple", "violett", ("violet", "violette"), "fialov", ("紫", "紫の"), "紫色"),
    "black": Adjective("black", "schwarz", ("noir", "noire"), "čern", ("黒", "黒い"), "黑色"),
    "white": Adjective("white", "weiß", ("blanc", "blanche"), "bíl", ("白", "白い"), "白色"),
}

SIZE_WORDS = {
    "small": Adjective("small", "klein", ("petit", "petite"), "mal", ("小", "小さな"), "小"),
    "large": Adjective("large", "groß", ("grand", "grande"), "velk", ("大", "大きな"), "大"),
}

# Where the picture plays, as an adverbial; the Japanese ones end in the particle of existence.
SETTING_PHRASES = {
    "meadow": {
        "en": "in a meadow",
        "de": "auf einer Wiese",
        "fr": "dans un pré",
        "cs": "na louce",
        "ja": "草原に",
        "zh": "草地上",
    },
    "beach": {
        "en": "on a beach",
        "de": "an einem Strand",
        "fr": "sur une plage",
        "cs": "na pláži",
        "ja": "砂浜に",
        "zh": "沙滩上",
    },
    "snow": {
        "en": "in the snow",
        "de": "im Schnee",
        "fr": "dans la neige",
        "cs": "ve sněhu",
        "ja": "雪の上に",
        "zh": "雪地上",
    },
    "room": {
        "en": "in a room",
        "de": "in einem Zimmer",
        "fr": "dans une pièce",
        "cs": "v pokoji",
        "ja": "部屋の中に",
        "zh": "房间里",
    },
}

STUFF_WORDS = {  # what the detector calls the pieces of background
    "sky": {"en": "sky", "de": "Himmel", "fr": "ciel", "cs": "nebe", "ja": "空", "zh": "天空"},
    "wall": {"en": "wall", "de": "Wand", "fr": "mur", "cs": "stěna", "ja": "壁", "zh": "墙"},
    "grass": {"en": "grass", "de": "Gras", "fr": "herbe", "cs": "tráva", "ja": "草", "zh": "草"},
    "sand": {"en": "sand", "de": "Sand", "fr": "sable", "cs": "písek", "ja": "砂", "zh": "沙子"},
    "snow": {"en": "snow", "de": "Schnee", "fr": "neige", "cs": "sníh", "ja": "雪", "zh": "雪"},
    "floor": {"en": "floor", "de": "Boden", "fr": "sol", "cs": "podlaha", "ja": "床", "zh": "地板"},
}


def label_words(label: str) -> dict[str, str]:
    """The dictionary form of an object kind or a piece of background, per language."""
    if label in STUFF_WORDS:
        return STUFF_WORDS[label]
    noun = NOUNS[label]
    return {"en": noun.en, "de": noun.de, "fr": noun.fr, "cs": noun.cs[0], "ja": noun.ja, "zh": noun.zh}
