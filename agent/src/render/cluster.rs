//! A cluster for people: the verdict, a picture of all pairs, and what is wrong with which.

use std::collections::BTreeSet;

use anstyle::{AnsiColor, Style};

use super::{BAD, FAINT, GOOD, columns, printable, text, trimmed, verdict_line};
use crate::cluster::{AgentState, ClusterNode, ClusterStatus, Pair, PairState};
use crate::status::Verdict;

const HELD: Style = AnsiColor::Yellow.on_default().bold();

/// The largest cluster of which a picture fits on a screen.
const PICTURE: usize = 20;
/// How many names of a kind are shown, unless all are asked for.
const NAMES: usize = 10;

/// What all agents of a cluster say together.
pub(crate) fn cluster(status: &ClusterStatus, wide: bool) -> String {
    let mut lines = vec![verdict_line(status.verdict, &status.summary)];
    if (2..=PICTURE).contains(&status.nodes.len()) {
        lines.push(String::new());
        lines.extend(picture(status));
    }
    let groups = status.by_reason();
    if !groups.is_empty() {
        lines.push(format!("\n{BAD}not encrypted{BAD:#}"));
        for (state, why, pairs) in groups {
            let style = style(state);
            lines.push(format!(
                "  {style}{}{style:#} {}",
                word(state),
                ways(&pairs, status, wide)
            ));
            lines.push(format!("    {}", printable(&why.to_string())));
        }
    }
    let troubled = status.nodes.iter().map(|node| (node, status.other_problems(node)));
    let troubled: Vec<_> = troubled.filter(|(_, problems)| !problems.is_empty()).collect();
    if !troubled.is_empty() {
        lines.push(format!("\n{BAD}nodes that need a look{BAD:#}"));
        for (node, problems) in troubled {
            lines.push(format!("  {}", node.node));
            for problem in problems {
                lines.push(format!("    - {}", printable(&problem.to_string())));
            }
        }
    }
    if wide {
        lines.push(String::new());
        lines.push(node_table(&status.nodes));
    }
    text(&lines)
}

/// Rows send, columns receive.
fn picture(status: &ClusterStatus) -> Vec<String> {
    let name = status.nodes.iter().map(|node| node.node.as_str().len()).max();
    let name = name.unwrap_or_default().max("from, to".len());
    let numbers: String = (1..=status.nodes.len()).map(|number| format!("{number:>3}")).collect();
    let mut lines = vec![format!("{FAINT}    {:<name$}{numbers}{FAINT:#}", "from, to")];
    let mut pairs = status.pairs.iter();
    let mut seen = BTreeSet::new();
    for (row, node) in status.nodes.iter().enumerate() {
        let mut line = format!("{FAINT}{:>3}{FAINT:#} {:<name$}", row + 1, node.node.as_str());
        for column in 0..status.nodes.len() {
            let pair = if row == column { None } else { pairs.next() };
            line += &pair.map_or_else(
                || format!("{FAINT}  \u{b7}{FAINT:#}"),
                |pair| {
                    seen.insert(pair.state);
                    let style = style(pair.state);
                    format!("  {style}{}{style:#}", letter(pair.state))
                },
            );
        }
        lines.push(line);
    }
    let legend: Vec<String> = seen
        .iter()
        .rev()
        .map(|state| format!("{} {}", letter(*state), word(*state)))
        .collect();
    lines.push(format!("{FAINT}    {}{FAINT:#}", legend.join(", ")));
    lines
}

fn letter(state: PairState) -> char {
    match state {
        PairState::Encrypted => 'E',
        PairState::Dropped => 'D',
        PairState::Plain => 'P',
        PairState::Clear => 'C',
        PairState::Unknown => '?',
    }
}

fn word(state: PairState) -> &'static str {
    match state {
        PairState::Encrypted => "encrypted",
        PairState::Dropped => "dropped",
        PairState::Plain => "in the clear by configuration",
        PairState::Clear => "may be in the clear",
        PairState::Unknown => "unknown",
    }
}

fn style(state: PairState) -> Style {
    match state {
        PairState::Encrypted => GOOD,
        PairState::Dropped | PairState::Plain | PairState::Unknown => HELD,
        PairState::Clear => BAD,
    }
}

/// Pairs in few words: what they have in common once.
fn ways(pairs: &[&Pair], status: &ClusterStatus, wide: bool) -> String {
    let from: BTreeSet<&str> = pairs.iter().map(|pair| pair.from.as_str()).collect();
    let to: BTreeSet<&str> = pairs.iter().map(|pair| pair.to.as_str()).collect();
    let ends = |names: &BTreeSet<&str>| {
        // Of each to all others, which of a few nodes would hide it.
        if names.len() > 2 && names.len() + 1 == status.nodes.len() {
            return "all others".to_owned();
        }
        some(names.iter().map(|name| (*name).to_owned()), wide)
    };
    if from.len() == 1 || to.len() == 1 {
        return format!("{} -> {}", ends(&from), ends(&to));
    }
    some(pairs.iter().map(|pair| format!("{} -> {}", pair.from, pair.to)), wide)
}

/// The first few of a list, and how many more there are.
fn some(items: impl ExactSizeIterator<Item = String>, wide: bool) -> String {
    let count = items.len();
    let shown = if wide { count } else { NAMES };
    let listed = items.take(shown).collect::<Vec<_>>().join(", ");
    match count.checked_sub(shown) {
        None | Some(0) => listed,
        Some(more) => format!("{listed} and {more} more"),
    }
}

fn node_table(nodes: &[ClusterNode]) -> String {
    let mut table = columns(&["NODE", "POD", "AGENT", "VERDICT", "GATE", "BACKEND", "KEY"]);
    let or_nothing = |word: &Option<String>| word.as_deref().map_or_else(|| "-".to_owned(), printable);
    for node in nodes {
        let agent = match node.agent {
            AgentState::Answers => "answers",
            AgentState::Silent => "silent",
            AgentState::Missing => "missing",
        };
        let verdict = match node.verdict {
            Some(Verdict::Healthy) => "healthy",
            Some(Verdict::Degraded) => "degraded",
            None => "-",
        };
        table.add_row([
            node.node.to_string(),
            or_nothing(&node.pod),
            agent.to_owned(),
            verdict.to_owned(),
            or_nothing(&node.gate),
            or_nothing(&node.backend),
            or_nothing(&node.fingerprint),
        ]);
    }
    trimmed(&table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::tests::{Mesh, refuse};

    /// What is shown, without colours.
    fn shown(mesh: &Mesh, wide: bool) -> String {
        anstream::adapter::strip_str(&cluster(&mesh.judged(), wide)).to_string()
    }

    #[test]
    fn a_healthy_cluster_is_a_verdict_and_a_picture() {
        let expected = "\
healthy: each of 6 pairs of 3 nodes is encrypted

    from, to  1  2  3
  1 a         \u{b7}  E  E
  2 b         E  \u{b7}  E
  3 c         E  E  \u{b7}
    E encrypted
";
        assert_eq!(shown(&Mesh::of(["a", "b", "c"]), false), expected);
    }

    #[test]
    fn what_is_not_encrypted_is_told_with_its_reason() {
        let mut mesh = Mesh::of(["a", "b", "c", "d"]);
        for other in ["a", "b"] {
            mesh.change(other, |status| refuse(status, "c", "it is on the deny list"));
        }
        mesh.remove("d");

        let expected = "\
degraded: 2 of 12 pairs of 4 nodes are encrypted, 3 may be in the clear, 7 dropped; no agent: d

    from, to  1  2  3  4
  1 a         \u{b7}  E  D  D
  2 b         E  \u{b7}  D  D
  3 c         D  D  \u{b7}  D
  4 d         C  C  C  \u{b7}
    E encrypted, D dropped, C may be in the clear

not encrypted
  may be in the clear d -> all others
    agent-missing: no agent's pod runs there, so what its pods send may be in the clear
  dropped c -> a, b
    node-refused: c is refused by the receiver: it is on the deny list
  dropped a, b -> c
    node-refused: c is refused by the sender: it is on the deny list
  dropped all others -> d
    node-refused: d is refused by the sender: it announces no key
";
        assert_eq!(shown(&mesh, false), expected);
    }

    #[test]
    fn what_is_in_the_clear_by_choice_is_told_and_no_reason_to_worry() {
        let mut mesh = Mesh::of(["a", "b", "c"]);
        mesh.leave_in_the_clear("a", "b");
        mesh.opt_out("a", "shop/cart");

        let expected = "\
healthy: 4 of 6 pairs of 3 nodes are encrypted, 2 in the clear by configuration; pods that have opted out: 1

    from, to  1  2  3
  1 a         \u{b7}  P  E
  2 b         P  \u{b7}  E
  3 c         E  E  \u{b7}
    E encrypted, P in the clear by configuration

not encrypted
  in the clear by configuration a -> b, b -> a
    pair-plain: both nodes are in zone z1
";
        assert_eq!(shown(&mesh, false), expected);
    }

    #[test]
    fn of_many_nodes_only_what_is_wrong_is_shown() {
        let names: Vec<String> = (10..32).map(|number| format!("n{number}")).collect();
        let mut mesh = Mesh::of(names.iter().map(String::as_str));
        mesh.silence("n10", "pod n10-x is pending");
        for other in &names[1..13] {
            mesh.change(other, |status| refuse(status, "n31", "it announces no key"));
        }

        let few = shown(&mesh, false);
        let all = shown(&mesh, true);

        let expected = "\
degraded: 417 of 462 pairs of 22 nodes are encrypted, 24 dropped, 21 unknown; no answer: n10

not encrypted
  unknown n10 -> all others
    agent-silent: pod n10-x is pending
  dropped n31 -> n11, n12, n13, n14, n15, n16, n17, n18, n19, n20 and 2 more
    node-refused: n31 is refused by the receiver: it announces no key
  dropped n11, n12, n13, n14, n15, n16, n17, n18, n19, n20 and 2 more -> n31
    node-refused: n31 is refused by the sender: it announces no key
";
        assert_eq!(few, expected);
        assert!(all.contains("n20, n21, n22 -> n31"), "{all}");
        assert!(all.contains("n31   n31-pod  answers  healthy  enforce"), "{all}");
    }
}
