//! A trace as one self-contained page of HTML: a lane for each CPU, and beside it the watched pages over time.
//!
//! No script, no font, no image: it opens anywhere, and what it shows is in the document, so a search finds it.
//!
//! Shape: time runs down. What happened on a CPU is a card in its lane. A watched page has four columns (its entry, the
//! line as the cache shows it, memory behind it, translations that are stale); their colour is their state after each
//! event, and the words stand only where they change. What happened before the CPUs ran is folded away in the first row,
//! the finding is the last.

use std::fmt::Write;

use super::{Event, PageState, Trace};

const STYLE: &str = include_str!("page.css");

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
    let setup = trace.events.iter().take_while(|event| event.cpu.is_none()).count();
    let (before, during) = trace.events.split_at(setup);
    let mut page = String::new();
    heading(&mut page, head);
    page.push_str("<div class=\"scroll\"><table id=\"trace\">");
    columns(&mut page, trace, cpus);
    page.push_str("<tbody>");
    let mut states: &[PageState] = before.last().map_or(&[], |event| &event.pages);
    first_row(&mut page, before, states, cpus);
    for event in during {
        row(&mut page, event, cpus, states);
        states = &event.pages;
    }
    if let Some(found) = &head.found {
        last_row(&mut page, found, during.last(), cpus, trace.watched.len());
    }
    page.push_str("</tbody></table></div></main></body></html>\n");
    page
}

// Writing to a string cannot fail: the results of `write!` below say nothing.

fn heading(page: &mut String, head: &Head) {
    let title = escape(&head.title);
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title} – Entresol lab</title>\
         <style>{STYLE}</style></head><body><main><header><p class=\"kicker\">Entresol lab</p><h1>{title}</h1>\
         <p class=\"about\">{}</p></header>",
        escape(&head.about),
    );
    match &head.found {
        Some(found) => {
            let _ = write!(page, "<section class=\"found\" id=\"found\">{}</section>", finding(found));
        }
        None => page.push_str("<section class=\"fine\">Nothing was found in this schedule.</section>"),
    }
    let _ = write!(
        page,
        "<p class=\"again\"><span>Again</span><code>{}</code></p><ul class=\"legend\">\
         <li class=\"valid\">valid entry</li><li class=\"dirty\">dirty line</li>\
         <li class=\"lag\">memory differs from the cache</li><li class=\"stale\">stale translations</li></ul>",
        escape(&head.replay)
    );
}

/// A finding begins with the name of its checker.
fn finding(found: &str) -> String {
    match found.split_once(": ") {
        Some((check, what)) => format!("<b>{}</b><span>{}</span>", escape(check), escape(what)),
        None => format!("<span>{}</span>", escape(found)),
    }
}

fn columns(page: &mut String, trace: &Trace, cpus: usize) {
    page.push_str("<thead><tr><th rowspan=\"2\" class=\"step\">step</th>");
    for cpu in 0..cpus {
        let _ = write!(page, "<th rowspan=\"2\" class=\"cpu cpu{cpu}\">CPU {cpu}</th>");
    }
    for (vm, gfn) in &trace.watched {
        let _ = write!(page, "<th colspan=\"4\" class=\"page\">VM {vm}, page {:#x}</th>", gfn.base());
    }
    page.push_str("</tr><tr>");
    for _ in &trace.watched {
        page.push_str("<th class=\"edge\">entry</th><th>in the cache</th><th>in memory</th><th>in TLBs</th>");
    }
    page.push_str("</tr></thead>");
}

/// What happened before the CPUs ran, folded away, and how it left the pages.
fn first_row(page: &mut String, events: &[Event], states: &[PageState], cpus: usize) {
    if events.is_empty() {
        return;
    }
    let _ = write!(
        page,
        "<tr class=\"setup\"><td class=\"step\"></td><td colspan=\"{cpus}\"><details id=\"setup\"><summary>before the CPUs \
         ran: {} events</summary><ol>",
        events.len()
    );
    for event in events {
        let _ = write!(page, "<li>{}</li>", words(event));
    }
    page.push_str("</ol></details></td>");
    states.iter().for_each(|state| watched(page, state, false));
    page.push_str("</tr>");
}

fn row(page: &mut String, event: &Event, cpus: usize, before: &[PageState]) {
    match event.cpu {
        None => {
            let _ = write!(
                page,
                "<tr class=\"after\"><td class=\"step\"></td><td colspan=\"{cpus}\">{}</td>",
                words(event)
            );
        }
        Some(here) => {
            let _ = write!(page, "<tr><td class=\"step\">{}</td>", event.step);
            for cpu in 0..cpus {
                let card =
                    if cpu == here { format!("<div class=\"card\">{}</div>", words(event)) } else { String::new() };
                let _ = write!(page, "<td class=\"lane cpu{cpu}\">{card}</td>");
            }
        }
    }
    for (place, state) in event.pages.iter().enumerate() {
        watched(page, state, before.get(place) == Some(state));
    }
    page.push_str("</tr>");
}

/// Where the schedule ended, and why.
fn last_row(page: &mut String, found: &str, last: Option<&Event>, cpus: usize, pages: usize) {
    let step =
        last.filter(|event| event.cpu.is_some()).map_or_else(|| "end".to_owned(), |event| event.step.to_string());
    let columns = cpus + 4 * pages;
    let _ = write!(
        page,
        "<tr class=\"violation\" id=\"violation\"><td class=\"step\">{step}</td><td colspan=\"{columns}\">{}</td></tr>",
        finding(found)
    );
}

/// An event, and the line of the core that did it.
fn words(event: &Event) -> String {
    let place = event.place.as_ref().map_or(String::new(), |place| format!("<small>{}</small>", escape(place)));
    let by = if event.what.starts_with("guest ") { " class=\"guest\"" } else { "" };
    format!("<span{by}>{}</span>{place}", escape(&event.what))
}

/// The four cells of a page. What did not change keeps its colour and is not said again.
fn watched(page: &mut String, state: &PageState, same: bool) {
    let say = |text: String| if same { String::new() } else { text };
    let word = |word: Option<u64>| word.map_or("–".to_owned(), |word| format!("{word:#x}"));
    let valid = if state.cached.is_some() { " valid" } else { "" };
    let dirty = if state.dirty { "dirty" } else { "" };
    let lag = if state.cached == state.memory { "" } else { "lag" };
    let (stale, in_tlbs) = match state.stale {
        0 => ("", "–".to_owned()),
        count => ("stale", format!("{count} stale")),
    };
    let _ = write!(
        page,
        "<td class=\"state edge{valid}\">{}</td><td class=\"state {dirty}\">{}</td><td class=\"state {lag}\">{}</td>\
         <td class=\"state {stale}\">{}</td>",
        say(escape(&state.entry)),
        say(word(state.cached)),
        say(word(state.memory)),
        say(in_tlbs),
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
        let event = |step, cpu, what: &str| Event {
            step,
            cpu,
            what: what.to_owned(),
            place: Some("core/x.rs:1".to_owned()),
            pages: vec![state.clone()],
        };
        let events = vec![event(0, None, "setup"), event(4, Some(1), "a < b"), event(5, Some(0), "guest load")];
        let trace = Trace { events, watched: vec![(0, Gfn::new(1))] };
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
            "<td class=\"state lag\">0xdead</td>",
            "<td class=\"state lag\"></td>",
            "<td class=\"state dirty\">0x55</td>",
            "VM 0, page 0x1000",
            "1 stale",
            "<summary>before the CPUs ran: 1 events</summary>",
            "<span class=\"guest\">guest load</span><small>core/x.rs:1</small>",
            "<td class=\"step\">5</td><td colspan=\"6\"><b>INV-1</b><span>x</span></td>",
        ] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
        assert_eq!(page.matches("<tr").count(), page.matches("</tr>").count());
    }
}
