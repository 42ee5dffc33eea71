r"""Personal data in public formats of 15 countries: what the PII filter is measured on.

The filter was not made from these texts: they were written before it was changed, after the formats
that telephone regulators, SWIFT's IBAN registry, card issuers and RFCs publish. Leave single lines
out of the work on patterns; use ``pii_corpus`` for that. Numbers are those of public institutions,
of ranges reserved for fiction, of test cards and of the registry's examples. ``{kind:value}`` is an
entity.
"""

from __future__ import annotations

import re

from tests.data.pii_corpus import Sample

_PHONES = r"""
Call the office on {phone:(202) 456-1111} before five.
Ring {phone:202-456-1414}, then press 2.
Our fax is {phone:1-202-225-3121}.
Toll free: {phone:1 (800) 829-1040}
You can text {phone:212.555.0142} as well.
From abroad dial {phone:001 202 456 1111}.
my cell: {phone:+1 617-555-0173}
Her number is {phone:020 7219 3000}, ask for Ann.
Write or call {phone:(020) 7946 0018}.
The shop in Leeds has {phone:0113 496 0123}.
He left {phone:07700 900461} on the pad.
Mobile {phone:07400 123456} (evenings)
Freephone {phone:0800 111 2345} is open all night.
Dial {phone:0044 20 7946 0958} from Spain.
{phone:+44 (0)20 7219 4272} is the enquiry service.
whatsapp {phone:+44 7911 123456}
Sie erreichen uns unter {phone:030 22732152}.
Telefon: {phone:030/227-32152}
Tel. {phone:(030) 18 272 2720}, Mo bis Fr
Meine Handynummer ist {phone:0171 3920012}.
Mobil {phone:0176-04069012}
Handy: {phone:01512 3456789}
Bitte {phone:0049 89 12345678} anrufen.
Die Zentrale hat die {phone:+49 89 2180-0}.
Fax {phone:+49 (0)221 4710123}
Appelez le {phone:01 40 63 60 00} le matin.
T\u00e9l. : {phone:01.40.20.53.17}
mon portable, c'est le {phone:06 12 34 56 78}
Portable {phone:0612345678}
Depuis l'\u00e9tranger : {phone:+33 1 40 63 60 00}
ou bien {phone:0033 6 12 34 56 78}, merci.
num\u00e9ro vert {phone:0 800 123 456}
Ll\u00e1mame al {phone:612 34 56 78} por la tarde.
Tel\u00e9fono: {phone:913 302 800}
El museo: {phone:91 330 28 00}.
M\u00f3vil {phone:634567890}
desde fuera {phone:+34 913 30 28 00}
o el {phone:0034 612 345 678}.
Il mio numero \u00e8 {phone:339 123 4567}.
Cellulare: {phone:347 1234567}
Chiama lo {phone:06 6706 2222} a Roma.
Tel. {phone:02 8846 4500} (Milano)
Ufficio {phone:055 294883}, interno 3
dall'estero {phone:+39 06 6706 2222}
oppure {phone:+39 333 1234567}
Bel {phone:020 674 7000} voor kaartjes.
Mijn nummer is {phone:06 12345678}.
Mobiel: {phone:06-12345678}
het 06-nummer {phone:0612345678} werkt
Kantoor {phone:(070) 318 2211}
uit het buitenland {phone:+31 20 674 7000}
Of via {phone:0031 6 1234 5678}.
Bel {phone:02 549 81 11} in Brussel.
Gsm {phone:0470 12 34 56}
T\u00e9l {phone:04 221 91 11} \u00e0 Li\u00e8ge
GSM: {phone:0498/12.34.56}
vanuit Nederland {phone:+32 2 549 81 11}
Mein Natel: {phone:079 123 45 67}
Parlamentsdienste {phone:058 322 87 90}
Z\u00fcrich {phone:044 412 31 11}, Empfang
aus Deutschland {phone:+41 44 412 31 11}
Schweiz: {phone:0041 79 123 45 67}
Ruf {phone:0664 1234567} an!
Wien {phone:01 40110 2570}
Graz {phone:0316 872 7466}
\u00d6sterreich: {phone:+43 1 401 10 0}
Handy {phone:+43 664 123 45 67}
Zadzwo\u0144 pod {phone:512 345 678}.
Kancelaria: {phone:22 694 25 00}
kom. {phone:601-234-567}
tel. {phone:(22) 694 17 00} wew. 12
z zagranicy {phone:+48 22 694 25 00}
Ring {phone:08-786 40 00} under dagen.
Mobil: {phone:070-174 06 05}
Mitt nummer \u00e4r {phone:073 123 45 67}.
G\u00f6teborg {phone:031-365 00 00}
fr\u00e5n utlandet {phone:+46 8 786 40 00}
Ligue para {phone:(61) 3303-4141} em Bras\u00edlia.
Celular {phone:(11) 91234-5678}
Zap: {phone:11 91234-5678}
Fixo {phone:(21) 2555-1234}
do exterior {phone:+55 61 3303-4141}
Delhi office {phone:011-23015321}
Mobile no. {phone:98765 43210}
call me at {phone:09876543210}
Mumbai: {phone:022 2202 5000}
WhatsApp {phone:+91 98765 43210} only
from the UK {phone:0091 98765 43210}
Canberra {phone:(02) 6277 7111}
Her mobile's {phone:0491 570 156}.
Ring {phone:1300 975 707} for the hotline.
Melbourne {phone:03 9555 0123}
overseas callers {phone:+61 2 6277 7111}
or {phone:+61 491 570 156}.
"""

_ACCOUNTS = r"""
IBAN: {iban:DE89 3704 0044 0532 0130 00}
Konto {iban:DE89370400440532013000}, Verwendungszweck Miete
iban de lui {iban:fr14 2004 1010 0505 0001 3m02 606}
Virement sur {iban:FR1420041010050500013M02606}.
pay {iban:GB29 NWBK 6016 1331 9268 19} by Friday
my iban is {iban:gb29nwbk60161331926819}
Cuenta {iban:ES91 2100 0418 4502 0005 1332}
cuenta {iban:ES91-2100-0418-4502-0005-1332}
conto {iban:IT60 X054 2811 1010 0000 0123 456}
bonifico su {iban:it60x0542811101000000123456}
Rekening {iban:NL91 ABNA 0417 1643 00}
overmaken naar {iban:nl91 abna 0417 1643 00} graag
{iban:BE68 5390 0754 7034} (KBC)
IBAN {iban:CH93 0076 2011 6238 5295 7}
Spendenkonto: {iban:AT61 1904 3002 3457 3201}
rachunek {iban:PL61 1090 1014 0000 0712 1981 2874}
{iban:SE45 5000 0000 0583 9825 7466} i banken
conta {iban:BR18 0036 0305 0000 1000 9795 493C 1}
The transfer to {iban:DE89 3704 0044\n0532 0130 00} broke over two lines.
<td>{iban:FR14\u00a02004\u00a01010\u00a00505\u00a00001\u00a03M02\u00a0606}</td>
Charge {card:4111 1111 1111 1111}, please.
card={card:4242424242424242}&exp=1227
my visa {card:4012-8888-8888-1881} expires soon
Mastercard {card:5555 5555 5555 4444}
MC {card:5105105105105100}
new series {card:2223 0031 2200 3222}
Amex {card:3782 822463 10005} 03/27
amex {card:371449635398431}
Amex {card:3714-496353-98431}
Diners {card:3056 930902 5904}
Diners {card:3622 720627 1667}
Discover {card:6011 1111 1111 1117}
JCB {card:3530-1113-3330-0000}
UnionPay {card:6200000000000005}
Carte bancaire {card:4970 1012 3456 7893}.
"{card:4111.1111.1111.1111}" was on the slip
paid with {card:5555.5555.5555.4444}
number {card:4111 1111\n1111 1111} wrapped in the mail
It says {card:4000\u00a00566\u00a05566\u00a05556}
Karte {card:4000\u20110566\u20115566\u20115556}
SSN {ssn:219-09-9999}
social security number {ssn:457-55-5462}.
ssn: {ssn:078051120}
SSN {ssn:219 09 9999}
tax form with {ssn:219.09.9999}
"""

_ADDRESSES = r"""
Write to {email:info@parliament.uk}.
mailto:{email:poststelle@bundestag.de}
Contact {email:first.last+tag@sub.example.com}, or the desk.
"{email:o'neill@example.ie}"
mes coordonn\u00e9es : {email:prenom.nom@exemple.fr}
{email:nome_cognome@esempio.it}; {email:altro@esempio.it}
correo {email:usuario-123@correo.example.es}
{email:j\u00f6rg@m\u00fcller.example} schrieb
Der Link <{email:kontakt@xn--mller-kva.example}>
E-Mail:{email:user%internal@mail.example.org}
{email:ROOT@EXAMPLE.COM} in capitals
see {email:a@b.example}!
{email:customer/department@example.com} has a stroke
fullwidth {email:jane\uff20example.com}
hidden {email:jane@exam\u200bple.com}
server at {ip:192.0.2.17}
ping {ip:198.51.100.255} -c 3
http://{ip:203.0.113.9}:8080/x
DNS {ip:2001:4860:4860::8888}
host {ip:2001:db8:85a3::8a2e:370:7334}, port 22
[{ip:2001:db8::ff00:42:8329}]:443
route add {ip:10.20.0.0}/16
{ip:fe80::1ff:fe23:4567:890a}%eth0
mapped {ip:::ffff:203.0.113.9}
from {ip:172.16.254.1} to {ip:172.16.254.2}
fullwidth {ip:\uff11\uff19\uff12.\uff10.\uff12.\uff11}
fullwidth {card:\uff14\uff11\uff11\uff11 1111 \uff11\uff11\uff11\uff11 1111}
bold {phone:\U0001d7ce20 7946 0958}
arabic digits {phone:+\u0664\u0664 \u0662\u0660 \u0667\u0669\u0664\u0666 \u0660\u0669\u0665\u0668}
devanagari {phone:+\u0967 \u0968\u0966\u0968 \u096a\u096b\u096c \u0967\u0967\u0967\u0967}
soft hyphens {iban:DE89\u00ad3704\u00ad0044\u00ad0532\u00ad0130\u00ad00}
zero width {ssn:219\u200b-09-\u200b9999}
"""

_NOTHING = r"""
The meeting is on 01.02.2023 at 10:30.
Le 06/12/2024, 14h30, salle 12.
from 2019-01-02 to 2019-11-30
on 2024 01 15 and on 15 01 2024
05-06-2024 and 5.6.2024 and 05 06 2024
10.12.2024 18:45:00
2024-05-06T07:08:09+02:00
It costs 1.234.567,89 \u20ac or 1 234 567,89 EUR.
$ 1,234,567.89 plus 19 % of 0.123456789
Die Stadt hat 612.345 Einwohner, das Land 612.345.678.
\u20ac 0,0612345678 per unit
Prix : 12 345,00 \u20ac, r\u00e9f\u00e9rence 2024-0012
CHF 1'234'567.80
0.612345678 and 0.0491570156
pi is 3.14159265358979, e is 2.71828
scores 21-15, 15-21, 21-19 and 0-6, 06-12
version 2.0.13, 10.4.0-beta.2, 0.12.345
python 3.11.9, node 20.11.1, gcc 13.2.0
release 06.12.34.56 of the driver
order no. 0012345678 has shipped
Bestellnummer 0301234567890123
Order 114-1234567-7654321
invoice INV-2024-000123, ref. 00123-456
tracking 1Z 999 AA1 01 2345 6784
tracking number 0034 0434 1234 5678 9012
ISBN 978-3-16-148410-0 and 3-16-148410-X
ISSN 2049-3630, DOI 10.1000/182
EAN 4006381333931, GTIN 00012345600012
IMEI 490154203237518
mod 0x0612345678 and #061234
const MAX = 0612345678901;
x = 0123456789
digits = "0123456789"
id 550e8400-e29b-41d4-a716-446655440000
0612345678abcdef0612345678abcdef
commit 0612345 and 07700900
timestamp 1700000000 and 1700000000000
[1, 20, 300, 4000, 50000]
10 20 30 40 50 60 70 80
01 02 03 04 05 06
1 2 3 4 5 6 7 8 9 10
8 800 and 9 600 and 12 400 people
912 345 of 1 000 000 voters
between 100 000 000 and 999 999 999
mm 12 x 345 x 6789
48.8566, 2.3522 and -33.8688, 151.2093
48\u00b051'24"N 2\u00b021'03"E
area 51, route 66, section 230, room 101
25/12, 31/10/2025, 7/4
ports 8080, 8443, 27017 and 5432
255.255.255, 1.2.3 and 300.1.2.3
12:30:45.678 and 00:00:01
00:1B:44:11:3A:B7
pages 123-145, 201-210
license 12-345-678
line 404: error 500 after 3000 ms
rgba(12, 34, 56, 0.78)
1e10 2.5e-3 6.02214076e23
(1) first (2) second (3) third
(12) 34, (123) 456
grid 1024 768 32 60
SELECT * FROM t WHERE id IN (100, 200, 300)
192 x 168, 10 x 0
train 0612 leaves at 07:45, gate 12
4111 1111 1111 1112 has a wrong digit
DE89 3704 0044 0532 0130 01 does not check
666-12-3456 was never issued
follow @jane and @app.route
scp file root@host:/tmp
matrix A@B and C@D.T
$0.02 per 1,000 tokens, 4,096 in, 128,000 out
0 800 rows in 1.5 s
CVE-2021-44228, RFC 9110, ISO 13616
ETA 08:15 - 09:45
temperature -12.5 to +40.0
H2O, CO2, C6H12O6
tensor([0.0312, 0.2450, 0.6123])
chapter 1.2.3.4, clause 10.2.1.1
+5 -3 +12 = 14
seats 12A-34F
0b0101101, 0o755
"""

_ENTITY = re.compile(r"\{(email|phone|ssn|card|iban|ip):(.+?)\}", re.DOTALL)


def _samples(lines: str) -> list[Sample]:
    samples: list[Sample] = []
    for line in lines.split("\n"):
        # The lines are ASCII; `\\u00e9` in them is a character.
        text = line.encode().decode("unicode_escape")
        if text:
            plain = _ENTITY.sub(lambda match: match[2], text)
            samples.append(Sample(plain, tuple(_ENTITY.findall(text))))
    return samples


def positives() -> list[Sample]:
    """Texts with an entity or more."""
    return _samples(_PHONES + _ACCOUNTS + _ADDRESSES)


def negatives() -> list[Sample]:
    """Texts with no entity, which are full of numbers."""
    return _samples(_NOTHING)
