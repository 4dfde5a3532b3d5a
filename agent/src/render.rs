//! Answers for people: the verdict in one line, then columns. NO_COLOR and pipes are honoured by the stream that prints them.

mod cluster;

use std::collections::BTreeSet;

use anstyle::{AnsiColor, Style};
use comfy_table::{Table, TableStyle};
use serde::Serialize;
use shroud_model::NodeName;

use crate::cleanup::Cleaned;
use crate::cli::Output;
use crate::status::{Explanation, GateCounters, OptOutStatus, Outcome, PeerStatus, RotationStatus, Status, Verdict};

pub(crate) use self::cluster::cluster;

const GOOD: Style = AnsiColor::Green.on_default().bold();
const BAD: Style = AnsiColor::Red.on_default().bold();
const FAINT: Style = Style::new().dimmed();

/// Renders an answer in the wished form; `table` makes the form for people, told whether it may be wide.
pub(crate) fn render<T: Serialize>(answer: &T, output: Output, table: impl Fn(&T, bool) -> String) -> String {
    match output {
        Output::Table => table(answer, false),
        Output::Wide => table(answer, true),
        Output::Json => {
            let mut text = serde_json::to_string_pretty(answer).expect("an answer has only text keys");
            text.push('\n');
            text
        }
        Output::Yaml => serde_saphyr::to_string(answer).expect("an answer has only text keys"),
    }
}

/// The verdict, the peers, and what needs a look.
pub(crate) fn status(status: &Status, wide: bool) -> String {
    let mut lines = vec![verdict_line(status.verdict, &status.summary)];
    let gate = &status.gate;
    lines.push(format!(
        "{FAINT}node {}  key {}  {} {} on port {}  gate {} on {}{FAINT:#}",
        status.node,
        status.fingerprint,
        status.encryption.backend,
        status.encryption.device,
        status.encryption.listen_port,
        gate.mode,
        list_or(&gate.uplinks, "nothing")
    ));
    if let Some(change) = &status.rotation {
        lines.push(format!("{FAINT}{}{FAINT:#}", rotation_line(change)));
    }
    if wide {
        lines.push(format!("{FAINT}backend: {}{FAINT:#}", status.encryption.because));
        for device in &status.encryption.devices {
            lines.push(format!(
                "{FAINT}{} on port {}: key {}, leads to {} peers, used for {}{FAINT:#}",
                device.name, device.listen_port, device.fingerprint, device.peers, device.used_for
            ));
        }
        lines.push(format!(
            "{FAINT}pass {}: {} changes in {:.0} ms  directory: {} ({}){FAINT:#}",
            status.pass.number,
            status.pass.changes,
            status.pass.seconds * 1000.0,
            status.directory.source,
            status.directory.state
        ));
    }
    lines.push(String::new());
    lines.push(peer_table(status, wide));
    if !status.refused.is_empty() {
        lines.push(format!("\n{BAD}refused{BAD:#}"));
        let mut table = columns(&["NODE", "FENCED", "REASON"]);
        for refused in &status.refused {
            let fenced: Vec<String> = refused.fenced.iter().map(ToString::to_string).collect();
            table.add_row([
                printable(&refused.node),
                list_or(&fenced, "-"),
                printable(&refused.reasons.join("; ")),
            ]);
        }
        lines.push(trimmed(&table));
    }
    if let Some(opted_out) = status.opted_out.as_deref().filter(|opted_out| !opted_out.is_empty()) {
        lines.push(format!("\n{BAD}opted out{BAD:#}"));
        lines.push(opt_out_table(opted_out, wide));
    }
    let zones: BTreeSet<&str> = status
        .peers
        .iter()
        .filter_map(|peer| peer.in_the_clear.as_deref())
        .collect();
    for why in zones {
        lines.push(format!(
            "\n{BAD}in the clear{BAD:#} to peers with backend none: {}",
            printable(why)
        ));
    }
    if !status.problems.is_empty() {
        lines.push(format!("\n{BAD}problems{BAD:#}"));
        for problem in &status.problems {
            lines.push(format!("  - {}", printable(&problem.to_string())));
        }
    }
    text(&lines)
}

/// How a change of key goes.
pub(crate) fn rotation(rotation: &RotationStatus, _wide: bool) -> String {
    text(&[rotation_line(rotation)])
}

fn rotation_line(rotation: &RotationStatus) -> String {
    const SHOWN: usize = 5;
    let mut waiting: Vec<&str> = rotation.waiting.iter().take(SHOWN).map(NodeName::as_str).collect();
    if rotation.waiting.len() > SHOWN {
        waiting.push("...");
    }
    let waiting = match waiting.as_slice() {
        [] => "nobody".to_owned(),
        waiting => waiting.join(", "),
    };
    format!(
        "new key {}: {} peers use it, {} do not answer, waiting for {waiting}, {} so far",
        rotation.fingerprint,
        rotation.followed,
        rotation.away,
        age(rotation.seconds)
    )
}

/// The pods that have opted out; the first few of them, where there is little room.
fn opt_out_table(opted_out: &[OptOutStatus], wide: bool) -> String {
    const SHOWN: usize = 10;
    let shown = if wide { opted_out.len() } else { SHOWN };
    let mut table = columns(&["POD", "NODE", "ADDRESS", "LABEL OF"]);
    for claim in opted_out.iter().take(shown) {
        table.add_row([
            printable(&claim.pod),
            claim.node.to_string(),
            claim.address.to_string(),
            printable(&claim.by),
        ]);
    }
    match opted_out.len().saturating_sub(shown) {
        0 => trimmed(&table),
        more => format!("{}\nand {more} more, see -o wide", trimmed(&table)),
    }
}

fn verdict_line(verdict: Verdict, summary: &str) -> String {
    let (style, word) = match verdict {
        Verdict::Healthy => (GOOD, "healthy"),
        Verdict::Degraded => (BAD, "degraded"),
    };
    format!("{style}{word}{style:#}: {}", printable(summary))
}

/// The table of peers.
pub(crate) fn peers(status: &Status, wide: bool) -> String {
    text(&[peer_table(status, wide)])
}

fn peer_table(status: &Status, wide: bool) -> String {
    let mut head = vec![
        "NODE",
        "BACKEND",
        "MODE",
        "ENDPOINT",
        "HANDSHAKE",
        "RX",
        "TX",
        "MTU",
        "KEY",
    ];
    if wide {
        head.push("PODS");
    }
    head.push("PROBLEMS");
    let mut table = columns(&head);
    for peer in &status.peers {
        table.add_row(peer_row(peer, wide));
    }
    if status.peers.is_empty() {
        return "no peers".to_owned();
    }
    trimmed(&table)
}

fn peer_row(peer: &PeerStatus, wide: bool) -> Vec<String> {
    let mut row = vec![
        peer.node.to_string(),
        match peer.in_the_clear {
            Some(_) => "none".to_owned(),
            None => peer.backend.clone(),
        },
        peer.mode.clone(),
        peer.endpoint
            .map_or_else(|| "-".to_owned(), |endpoint| endpoint.to_string()),
        peer.handshake_age_seconds.map_or_else(|| "never".to_owned(), age),
        bytes(peer.rx_bytes),
        bytes(peer.tx_bytes),
        peer.mtu.to_string(),
        peer.fingerprint.clone(),
    ];
    if wide {
        let prefixes: Vec<String> = peer.pod_prefixes.iter().map(ToString::to_string).collect();
        row.push(list_or(&prefixes, "-"));
    }
    let problems: Vec<String> = peer.problems.iter().map(ToString::to_string).collect();
    row.push(printable(&list_or(&problems, "-")));
    row
}

/// The gate's counters, and what it dropped last.
pub(crate) fn gate(gate: &GateCounters, wide: bool) -> String {
    let mut lines = vec![format!("gate {}\n", gate.mode)];
    let mut head = vec![
        "NODE",
        "DIRECTION",
        "FAMILY",
        "VERDICT",
        "REASON",
        "PACKETS",
        "BYTES",
        "PACKETS/S",
    ];
    if wide {
        head.push("BYTES/S");
    }
    let mut table = columns(&head);
    for counter in &gate.counters {
        let mut row = vec![
            if counter.node.is_empty() {
                "-".to_owned()
            } else {
                printable(&counter.node)
            },
            counter.direction.clone(),
            counter.family.clone(),
            counter.verdict.clone(),
            counter.reason.clone(),
            counter.packets.to_string(),
            bytes(counter.bytes),
            format!("{:.0}", counter.packets_per_second),
        ];
        if wide {
            row.push(bytes(counter.bytes_per_second as u64));
        }
        table.add_row(row);
    }
    if gate.counters.is_empty() {
        lines.push("nothing counted yet".to_owned());
    } else {
        lines.push(trimmed(&table));
    }
    if !gate.events.is_empty() {
        lines.push("\nlatest drops".to_owned());
        for event in &gate.events {
            lines.push(format!("  {}", printable(event)));
        }
    }
    text(&lines)
}

/// A packet's way.
pub(crate) fn explanation(explanation: &Explanation, _wide: bool) -> String {
    let (style, word) = match explanation.outcome {
        Outcome::Encrypted => (GOOD, "encrypted"),
        Outcome::Local => (GOOD, "local"),
        Outcome::Plain => (BAD, "in the clear"),
        Outcome::Dropped => (BAD, "dropped"),
        Outcome::Elsewhere => (FAINT, "not here"),
    };
    let mut lines = vec![format!(
        "{} -> {}: {style}{word}{style:#}: {}",
        explanation.source, explanation.destination, explanation.because
    )];
    for (number, step) in explanation.steps.iter().enumerate() {
        lines.push(format!(
            "  {}. {:<12} {}",
            number + 1,
            step.stage,
            printable(&step.says)
        ));
    }
    text(&lines)
}

/// What a cleanup did.
pub(crate) fn cleaned(cleaned: &Cleaned, _wide: bool) -> String {
    let mut lines = Vec::new();
    for (style, word, items) in [
        (GOOD, "removed", &cleaned.removed),
        (BAD, "could not remove", &cleaned.failures),
        (FAINT, "kept", &cleaned.kept),
    ] {
        for item in items {
            lines.push(format!("{style}{word}{style:#} {}", printable(item)));
        }
    }
    if cleaned.removed.is_empty() {
        lines.push("nothing of ours was there".to_owned());
    }
    text(&lines)
}

fn text(lines: &[String]) -> String {
    lines.join("\n") + "\n"
}

fn columns(head: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new()).set_header(head.iter().copied());
    table
}

fn trimmed(table: &Table) -> String {
    let lines: Vec<String> = table.to_string().lines().map(|line| line.trim().to_owned()).collect();
    lines.join("\n")
}

fn list_or(items: &[String], empty: &str) -> String {
    if items.is_empty() {
        empty.to_owned()
    } else {
        items.join(", ")
    }
}

/// Text that may come from elsewhere, without anything a terminal would obey.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// Seconds as people say them: `3s`, `2m`, `5h`, `4d`.
fn age(seconds: f64) -> String {
    match seconds as u64 {
        seconds @ ..120 => format!("{seconds}s"),
        seconds @ ..7200 => format!("{}m", seconds / 60),
        seconds @ ..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// Bytes with a binary unit: `812`, `4.0Ki`, `1.2Gi`.
fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["", "Ki", "Mi", "Gi", "Ti"] {
        if value < 1024.0 {
            return if unit.is_empty() {
                format!("{count}")
            } else {
                format!("{value:.1}{unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1}Pi")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::peer;

    #[test]
    fn what_is_in_the_clear_by_choice_is_told() {
        let near = PeerStatus {
            in_the_clear: Some("both nodes are in zone z1".to_owned()),
            ..peer("near")
        };
        let claim = |number: u8| OptOutStatus {
            pod: "shop/cart".to_owned(),
            node: "near".parse().unwrap(),
            address: [10, 244, 1, number].into(),
            by: "pod".to_owned(),
        };
        let mut of = crate::status::tests::status([near, peer("far")]);
        of.opted_out = Some((0..12).map(claim).collect());

        let shown = |wide| {
            let text = anstream::adapter::strip_str(&status(&of, wide)).to_string();
            let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
            text.lines().map(words).collect::<Vec<_>>().join("\n")
        };

        assert!(shown(false).contains("near none"), "{}", shown(false));
        assert!(shown(false).contains("in the clear to peers with backend none: both nodes are in zone z1"));
        assert!(
            shown(false).contains("shop/cart near 10.244.1.9 pod\nand 2 more, see -o wide"),
            "{}",
            shown(false)
        );
        assert!(shown(true).contains("10.244.1.11") && !shown(true).contains("more, see"));
    }

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(
            [bytes(0), bytes(1023), bytes(4096), bytes(1 << 30)],
            ["0", "1023", "4.0Ki", "1.0Gi"]
        );
        assert_eq!(
            [age(0.4), age(119.0), age(121.0), age(7200.0), age(200_000.0)],
            ["0s", "119s", "2m", "2h", "2d"]
        );
    }

    #[test]
    fn foreign_text_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\nc"), "a\u{fffd}[31mb\u{fffd}c");
    }
}
