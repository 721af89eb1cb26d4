"""The packages behind the letters of `mixed`: a family of fonts each, with its archive's SHA-256.

All are version 5.3.0 of `@fontsource/NAME`, under the SIL Open Font License 1.1 but for those in
`APACHE`. Chosen to look different: with and without serifs, written by hand, of typewriters and
screens, narrow, heavy.
"""

from __future__ import annotations

from fedprompt.data.reading.packages import Package

VERSION = "5.3.0"
KEPT = ("files/*-latin-[47]00-*.woff",)
"""Ordinary and bold, upright and slanted, as far as a family has them."""
APACHE = frozenset({"permanent-marker", "special-elite", "ultra"})
SHA256 = {
    "abril-fatface": "261304489f1ad9509af041947230865e79ae1e7c75c330b75d42d67a5c4a8aff",
    "anton": "796d0b1b7a503636458c0869ef9993659411c86443a4e4e7555ead4b29293db4",
    "arvo": "619c0fe2044237e0acb68c1b7139c53d2060b5189c789066c8af7960d26ceb53",
    "caveat": "ebf746fc0667b9d10fcac7c8604e2ba40a264da85a1c9b48bd679c0af3221293",
    "cinzel": "b80629f715b4603fd099c0ceaa94cc7a15308a75a9cf52f0613a312ee6d53c28",
    "comfortaa": "5c82d14fe6efc746213748a2835b7aa7b6e07409f1611eaee52eb25e0bdfcca6",
    "courier-prime": "fd204a077d81426e1425baed6d471ad78a8eccca931091e661637bb10b5f2724",
    "crimson-text": "9ca1f89ed823a36d15fdb8d4883798955cd43b4ead4a15b305e76cf8429f0ca4",
    "dancing-script": "e392efa74afec672f1c97f8699a16bb8439c8aca1a367ddb5cd035f11e70e31a",
    "fredoka": "3826ef8182dca8bec112e8320cd42c4aaec1b4cad9f6a3a2eaa4c98ee7ece323",
    "indie-flower": "be380503f1e2c5ef08b8399a28f8cb2f1725527db2cb6aacec3037c2bd1b9083",
    "josefin-sans": "a89f83ae9d414f027af83546b84e09ac81e960024dfdeea3bcb491e8ed52a962",
    "josefin-slab": "1487f879ffd1087c70d5d16b5144f82492dd86f5030d5fb74003d1764e86500c",
    "lobster": "4ac6f6ab805b684026cb719f55dd605c892ca5d1db3f32fca88ca554a63b86d7",
    "lora": "3f2e66b0934b8652bb1a37645a9fc3e77e83b5841a09e97174e7bb11e11063c9",
    "nunito": "4d8e1fb4f4a40c125c7a302b21e5c6810b86569b60bac0fa0405c04380f4c77b",
    "orbitron": "a9b5e98a3421cd897d7bc0c1d8683579d07191e03090913381daebbbe735f492",
    "oswald": "27bf46420288bb65bd186638cde54686aa8f9d5dc975b1d597dfe81a7dd472cb",
    "pacifico": "397f4f0a8a4c44e929cafa4cfede7240f7ac81a922f6779d3fefe2192c67d619",
    "permanent-marker": "1fc372d174353a87b0ae7bb9651e32e7d1731f9e0b4c50c5d8704baea032bc1b",
    "playfair-display": "564e61951ecc3e962793cd50395f718cda6350cb934f9000dbe0139c768dc023",
    "poppins": "f4779bb12acaaa07dc7dd8da82ab0f61515fea2f30664535f7a249eeb0dd5bcf",
    "pt-serif": "656a3f5ab62846715a6e933a1a850514c6b7aed018de6b0443f1a44ee77d7fd5",
    "quicksand": "237b3cc84bf92c235e17f11fcb54e8a889efeaed9a7bff4bacce8cb422e0a403",
    "raleway": "d5dc5cb4563286e45c5b832b0718fa36d84148405cf6f5d1903615a74d253ea8",
    "righteous": "f1eef6d5e0b87e0cba26208279d468f29139adddc339a98d61fcb8d7e374b4e3",
    "roboto": "77620f437249772e381698224ea1bddd01c985ecd60267a63ddc96b9eb9348f7",
    "rokkitt": "be52f3fb73a6ad2d91bf68f5b657e6e319ee98f3e6be89931d80a160c384f431",
    "space-mono": "e0cd78cb7aa93e772905297d8d5ad2a3d9eea7a6a12f281a3940a28ec01c19eb",
    "special-elite": "c4b33d38d9829a962bcb3fe8067ee8ce062c2a936e9e01fc072ddaf9cc897460",
    "ultra": "a925ba2567cff20fae72610c585d49141db1cb92984eaed828f81f5be2dd476e",
    "vt323": "aca9d83456bcebf445920008ac46e275206d48efd8360eb9cc4c6a04d45bcaf0",
    "zilla-slab": "b7db2f40f3aaeb44c0e1dfe3da1e5de96d177a674ffe5e5e012c59b6a01e8aab",
}

FONTS = tuple(
    Package(
        name=f"@fontsource/{name}",
        version=VERSION,
        sha256=sha256,
        licence="Apache-2.0" if name in APACHE else "OFL-1.1",
        source=f"the family {name} of Google Fonts",
        kept=KEPT,
    )
    for name, sha256 in SHA256.items()
)
