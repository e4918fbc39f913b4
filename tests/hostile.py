"""Text that tries to become active: each sets `window.owned`, loads something, or leads somewhere, if it succeeds."""

RUN = "window.owned=1"
HTML = [
    f"<script>{RUN}</script>",
    f"<SCRIPT SRC=data:text/javascript,{RUN}></SCRIPT>",
    f'<script type="module">{RUN}</script>',
    f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    f"</textarea><script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"<!--><script>{RUN}</script-->",
    f"<![CDATA[<script>{RUN}</script>]]>",
    f"<img src=x onerror={RUN}>",
    f'<img src=x onerror="{RUN}">',
    f"<img/src='x'/onerror='{RUN}'>",
    f"<img src=x:alert(1) onerror=eval(src) alt={RUN}>",
    f"<svg onload={RUN}>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f'<svg><a xlink:href="javascript:{RUN}"><text>click</text></a></svg>',
    f"<svg><foreignObject><iframe srcdoc='<script>{RUN}</script>'></foreignObject></svg>",
    f'<math><a xlink:href="javascript:{RUN}">click</a></math>',
    f"<iframe src='javascript:{RUN}'></iframe>",
    f'<iframe srcdoc="&lt;script&gt;{RUN}&lt;/script&gt;"></iframe>',
    f"<object data='javascript:{RUN}'></object>",
    f"<embed src='javascript:{RUN}'>",
    f"<body onload={RUN}>",
    f"<details open ontoggle={RUN}>",
    f"<video><source onerror={RUN}></video>",
    f"<audio src=x onerror={RUN}>",
    f"<marquee onstart={RUN}>",
    f"<input autofocus onfocus={RUN}>",
    f"<select autofocus onfocus={RUN}>",
    f"<form action='javascript:{RUN}'><button>go</button></form>",
    f"<button formaction='javascript:{RUN}'>go</button>",
    f"<a href='javascript:{RUN}'>click</a>",
    f'<a href="java\tscript:{RUN}">click</a>',
    f'<a href="&#106;avascript:{RUN}">click</a>',
    "<base href='https://evil.example/'>",
    "<link rel=stylesheet href='https://evil.example/x.css'>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<style>@import 'https://evil.example/x.css'; body { display: none }</style>",
    "<p style='position:fixed;inset:0;background:url(https://evil.example/x)'>over</p>",
    f"<template><script>{RUN}</script></template>",
    f"<noscript><p title='</noscript><img src=x onerror={RUN}>'></noscript>",
    f'"><img src=x onerror={RUN}>',
    f"' onmouseover='{RUN}",
    f'" autofocus onfocus="{RUN}',
    "{{constructor.constructor('window.owned=1')()}}",
    "${window.owned=1}",
]
MARKDOWN = [
    f"[click](javascript:{RUN})",
    f"[click](JaVaScRiPt:{RUN})",
    f"[click]( javascript:{RUN})",
    f"[click](java%0ascript:{RUN})",
    f"[click](\x01javascript:{RUN})",
    f"[click](vbscript:{RUN})",
    f"[click](data:text/html,<script>{RUN}</script>)",
    f"[click](blob:{RUN})",
    "[click](//evil.example/x)",
    "[click](/v1/models)",
    "[click](file:///etc/passwd)",
    f"<javascript:{RUN}>",
    f"![x](javascript:{RUN})",
    "![x](https://evil.example/tracker.png)",
    f'![x](x"onerror="{RUN})',
    f'[x](https://a.example/"onmouseover="{RUN})',
    f'[x](https://a.example "title" onmouseover={RUN})',
    f"[<img src=x onerror={RUN}>](https://a.example)",
    f"```<img src=x onerror={RUN}>\n<script>{RUN}</script>\n```",
    f'```"><script>{RUN}</script>\nx\n```',
    f"```html\n<script>{RUN}</script>\n```",
    f"`<script>{RUN}</script>`",
    f"# <img src=x onerror={RUN}>",
    f"> <svg onload={RUN}>",
    f"- <iframe srcdoc='<script>{RUN}</script>'>",
    f"1. <img src=x onerror={RUN}>",
    f"| <script>{RUN}</script> |\n|---|\n| <img src=x onerror={RUN}> |",
    f"**<b onclick={RUN}>bold</b>**",
    f"[ref]: javascript:{RUN}\n[ref]",
    "\u202e<script>\u202c \x00 \ufffe \u2028",
]
PAYLOADS = HTML + MARKDOWN

# What the page's log may hold, and nothing else; every link must lead to the web or to a mail.
ACTIVE = """() => {
    const found = [];
    if (window.owned) found.push('code ran');
    const known = 'article section div span h2 h3 h4 h5 h6 p ul ol li blockquote hr br em strong del a code pre ' +
        'figure figcaption table thead tbody tr th td button svg use textarea nav input label small img b';
    const isMeant = ({ name }) => !name.startsWith('on') && name !== 'style';
    for (const element of document.querySelectorAll('#log *, #sidebar *, #chat-title *')) {
        if (!known.split(' ').includes(element.localName)) found.push(element.outerHTML);
        if (![...element.attributes].every(isMeant)) found.push(element.outerHTML);
        if (element.localName === 'a' && !/^(https?|mailto):/.test(element.href)) found.push(element.outerHTML);
        if (element.localName === 'a' && !/noopener/.test(element.rel)) found.push(element.outerHTML);
    }
    for (const image of document.images) if (!image.src.endsWith('/ui/logo.svg')) found.push(image.outerHTML);
    if (document.querySelectorAll('iframe, object, embed, base, #log form, #log style, #log img, #log input').length) {
        found.push('an element that must not be');
    }
    return found;
}"""
