//! A trace as one self-contained page of HTML: a lane for each CPU, and beside it the watched pages after each event.
//!
//! No script, no font, no image: it opens anywhere, and what it shows is in the document, so a search finds it.

use std::fmt::Write;

use super::{Event, PageState, Trace};

const STYLE: &str = "
:root { color-scheme: light dark; --line: #8884; --dirty: #e67e2233; --lag: #c0392b33; --cpu: #2980b91f }
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem; max-width: 110rem }
h1 { font-size: 1.25rem } code, td { font-family: ui-monospace, monospace; font-size: 12px }
.found { border-left: 4px solid #c0392b; padding: .5rem .8rem; background: var(--lag) }
table { border-collapse: collapse; margin-top: 1rem } th, td { border: 1px solid var(--line); padding: .2rem .5rem }
th { position: sticky; top: 0; background: Canvas; text-align: left } td { vertical-align: top }
td.here { background: var(--cpu); max-width: 34rem } td.step { text-align: right; color: #888 }
td.dirty { background: var(--dirty) } td.lag { background: var(--lag); font-weight: bold }
small { color: #888; display: block } tr.setup td { color: #888 }
";

/// What stands above the lanes.
#[derive(Clone, Debug)]
pub struct Head {
    /// The scenario.
    pub title: String,
    /// What it is about.
    pub about: String,
    /// What was found, if something was.
    pub found: Option<String>,
    /// How to see the schedule again.
    pub replay: String,
}

/// The page for a schedule on `cpus` CPUs.
pub fn render(head: &Head, trace: &Trace, cpus: usize) -> String {
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head>\
         <body><h1>{title}</h1><p>{about}</p>",
        title = escape(&head.title),
        about = escape(&head.about),
    );
    if let Some(found) = &head.found {
        let _ = write!(page, "<p class=\"found\" id=\"found\">{}</p>", escape(found));
    }
    let _ =
        write!(page, "<p>Again: <code>{}</code></p><table id=\"trace\"><thead><tr><th>step</th>", escape(&head.replay));
    for cpu in 0..cpus {
        let _ = write!(page, "<th>CPU {cpu}</th>");
    }
    for (vm, gfn) in &trace.watched {
        let _ = write!(
            page,
            "<th>VM {vm}, {:#x}: entry</th><th>in the cache</th><th>in memory</th><th>stale</th>",
            gfn.base()
        );
    }
    page.push_str("</tr></thead><tbody>");
    let mut before: &[PageState] = &[];
    for event in &trace.events {
        row(&mut page, event, cpus, before);
        before = &event.pages;
    }
    page.push_str("</tbody></table></body></html>\n");
    page
}

fn row(page: &mut String, event: &Event, cpus: usize, before: &[PageState]) {
    let place = event.place.as_ref().map_or(String::new(), |place| format!("<small>{}</small>", escape(place)));
    let cell = format!("<td class=\"here\">{}{place}</td>", escape(&event.what));
    match event.cpu {
        None => {
            let _ = write!(
                page,
                "<tr class=\"setup\"><td class=\"step\"></td><td colspan=\"{cpus}\">{}{place}</td>",
                escape(&event.what)
            );
        }
        Some(here) => {
            let _ = write!(page, "<tr><td class=\"step\">{}</td>", event.step);
            (0..cpus).for_each(|cpu| page.push_str(if cpu == here { &cell } else { "<td></td>" }));
        }
    }
    for (place, state) in event.pages.iter().enumerate() {
        // What did not change is not said again.
        if before.get(place) == Some(state) {
            page.push_str("<td></td><td></td><td></td><td></td>");
        } else {
            watched(page, state);
        }
    }
    page.push_str("</tr>");
}

fn watched(page: &mut String, state: &PageState) {
    let word = |word: Option<u64>| word.map_or("–".to_owned(), |word| format!("{word:#x}"));
    let dirty = if state.dirty { " class=\"dirty\" title=\"the line is dirty\"" } else { "" };
    let lag = if state.cached == state.memory { "" } else { " class=\"lag\" title=\"memory lags behind the cache\"" };
    let stale = if state.stale == 0 { "–".to_owned() } else { state.stale.to_string() };
    let _ = write!(
        page,
        "<td>{}</td><td{dirty}>{}</td><td{lag}>{}</td><td>{stale}</td>",
        escape(&state.entry),
        word(state.cached),
        word(state.memory),
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_addr::Gfn;

    #[test]
    fn what_lags_is_marked_and_text_is_escaped() {
        let state = PageState {
            vm: 0,
            gfn: Gfn::new(1),
            entry: "rw- frame 0x400".to_owned(),
            cached: Some(0x55),
            dirty: true,
            memory: Some(0xdead),
            stale: 1,
        };
        let event = Event { step: 4, cpu: Some(1), what: "a < b".to_owned(), place: None, pages: vec![state] };
        let trace = Trace { events: vec![event], watched: vec![(0, Gfn::new(1))] };
        let head = Head {
            title: "t".to_owned(),
            about: "<script>".to_owned(),
            found: Some("INV-1: x".to_owned()),
            replay: "entresol lab replay".to_owned(),
        };
        let page = render(&head, &trace, 2);
        for part in [
            "a &lt; b",
            "&lt;script&gt;",
            "class=\"lag\"",
            "0xdead",
            "class=\"dirty\"",
            "VM 0, 0x1000: entry",
            "INV-1: x",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert_eq!(page.matches("<tr").count(), page.matches("</tr>").count());
    }
}
