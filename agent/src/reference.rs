//! Holds `docs/reference.md` together with the program: what is missing there, or left over, fails a test here. What is asked of an API
//! server is known to keyd, whose `the_client_asks_what_was_recorded` does the same for that table.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;

use clap::{Arg, CommandFactory};
use serde_json::Value;

use crate::cli::{Cli, Exit, Plugin};
use crate::config::Config;
use crate::http::Endpoint;
use crate::metrics;

/// The keys whose value in the example file is no default.
const WITHOUT_DEFAULT: [&str; 4] = ["node", "podPrefixes", "protected", "directory.file.path"];

const FOLDER: &str = "
node: node-1
podPrefixes: [10.244.1.0/24]
protected: [10.244.0.0/16]
directory: { file: { path: /etc/shroud/nodes } }
";

const CLUSTER: &str = "
node: node-1
podPrefixes: [10.244.1.0/24]
protected: [10.244.0.0/16]
directory: { kubernetes: {} }
";

/// The rows of the table with this head, by their first cell; backticks are left out.
fn table(head: &str) -> BTreeMap<String, Vec<String>> {
    let page = include_str!("../../docs/reference.md");
    let (_, below) = page
        .split_once(&format!("| {head} |"))
        .unwrap_or_else(|| panic!("docs/reference.md has no table {head:?}"));
    let rows = below.lines().skip(2).take_while(|line| line.starts_with('|'));
    let mut table = BTreeMap::new();
    for row in rows {
        let cells = row
            .trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().replace('`', ""));
        let mut cells: Vec<String> = cells.collect();
        assert!(
            cells.last().is_some_and(|meaning| !meaning.is_empty()),
            "no meaning: {row}"
        );
        let first = cells.remove(0);
        assert!(table.insert(first, cells).is_none(), "twice: {row}");
    }
    table
}

/// The same with the second cell alone.
fn defaults(head: &str) -> BTreeMap<String, String> {
    let rows = table(head).into_iter();
    rows.map(|(name, mut cells)| (name, cells.remove(0))).collect()
}

#[test]
fn every_key_is_listed_with_its_default() {
    let mut known = BTreeMap::new();
    for text in [FOLDER, CLUSTER] {
        let config = Config::parse(Path::new("shroud.yaml"), text).unwrap();
        collect("", &serde_json::to_value(config).unwrap(), &mut known);
    }
    for key in WITHOUT_DEFAULT {
        assert!(
            known.insert(key.to_owned(), String::new()).is_some(),
            "there is no {key}"
        );
    }

    assert_eq!(defaults("Key | Default | Meaning"), known);
}

/// Each key under which there is a value, with the value as YAML would have it.
fn collect(path: &str, value: &Value, known: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(map) => {
            for (key, below) in map {
                let key = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                collect(&key, below, known);
            }
        }
        Value::Array(list) => {
            let mut items: Vec<String> = list.iter().map(plain).collect();
            items.sort();
            known.insert(path.to_owned(), format!("[{}]", items.join(", ")));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            known.insert(path.to_owned(), plain(value));
        }
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[test]
fn every_argument_is_listed_with_its_default() {
    let mut known = BTreeMap::new();
    for mut command in [Cli::command(), Plugin::command()] {
        command.build();
        arguments("", &command, &mut known);
    }

    assert_eq!(defaults("Argument | Default | Meaning"), known);
}

fn arguments(path: &str, command: &clap::Command, known: &mut BTreeMap<String, String>) {
    let path = if path.is_empty() {
        command.get_name().to_owned()
    } else {
        format!("{path} {}", command.get_name())
    };
    let is_ours = |argument: &&Arg| !["help", "version"].contains(&argument.get_id().as_str());
    for argument in command.get_arguments().filter(is_ours) {
        let name = match argument.get_long() {
            Some(long) => format!("--{long}"),
            None => argument.get_id().as_str().to_uppercase(),
        };
        let defaults: Vec<String> = argument
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy().into_owned())
            .collect();
        known.insert(format!("{path} {name}"), defaults.join(" "));
    }
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        arguments(&path, below, known);
    }
}

#[test]
fn every_variable_that_an_argument_reads_is_named() {
    let page = include_str!("../../docs/reference.md");

    let command = Cli::command();
    let read = command
        .get_subcommands()
        .flat_map(clap::Command::get_arguments)
        .filter_map(|argument| argument.get_env()?.to_str());
    let variables: BTreeSet<&str> = read.collect();

    assert!(variables.contains("SHROUD_SOCKET"), "{variables:?}");
    for variable in variables {
        assert!(page.contains(&format!("`{variable}`")), "{variable}");
    }
}

#[test]
fn every_exit_code_is_listed() {
    // The compiler asks here for each new one.
    let next = |exit: Exit| match exit {
        Exit::Healthy => Some(Exit::Degraded),
        Exit::Degraded => Some(Exit::Usage),
        Exit::Usage => Some(Exit::Unreachable),
        Exit::Unreachable => Some(Exit::DeviceTaken),
        Exit::DeviceTaken => None,
    };
    let all: Vec<ExitCode> = std::iter::successors(Some(Exit::Healthy), |exit| next(*exit))
        .map(ExitCode::from)
        .collect();

    let codes = |numbers: &mut dyn Iterator<Item = &str>| -> Vec<ExitCode> {
        numbers
            .map(|code| ExitCode::from(code.parse::<u8>().unwrap()))
            .collect()
    };
    let listed = codes(&mut table("Code | Meaning").keys().map(String::as_str));
    let help = Cli::command().get_after_help().unwrap().to_string();
    let (_, helped) = help.split_once("Exit codes: ").unwrap();
    let helped = codes(&mut helped.split(", ").map(|part| part.split(' ').next().unwrap()));

    assert_eq!(listed, all);
    assert_eq!(helped, all);
}

#[test]
fn every_name_on_objects_is_listed() {
    let mut known = BTreeSet::new();
    for krate in ["agent", "keyd"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(krate).join("src");
        collect_names(&folder, &mut known);
    }
    assert!(known.contains(shroud_keyd::ANNOTATION), "{known:?}");

    let listed: BTreeSet<String> = table("Name | Is | Meaning").into_keys().collect();

    assert_eq!(listed, known);
}

/// The texts in the sources below a folder that are names as Kubernetes has them, a domain and a word: no versions of an API.
fn collect_names(folder: &Path, known: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect_names(&path, known);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = std::fs::read_to_string(&path).unwrap();
            let texts = source.split('"');
            known.extend(texts.filter(|text| is_name(text)).map(str::to_owned));
        }
    }
}

fn is_name(text: &str) -> bool {
    let Some((domain, word)) = text.split_once('/') else {
        return false;
    };
    let is_word = |text: &str| {
        text.starts_with(|first: char| first.is_ascii_lowercase())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    };
    let is_version = word.starts_with('v') && word[1..].starts_with(|c: char| c.is_ascii_digit());
    domain.contains('.') && domain.split('.').all(is_word) && is_word(word) && !is_version
}

#[test]
fn every_kind_of_failure_is_listed() {
    let listed: BTreeSet<String> = table("Kind | The directory's source failed because")
        .into_keys()
        .collect();

    assert_eq!(
        listed,
        shroud_keyd::FailureKind::IDS
            .iter()
            .copied()
            .map(str::to_owned)
            .collect()
    );
}

#[test]
fn every_endpoint_is_listed() {
    let listed: BTreeSet<String> = table("Path | Answers").into_keys().collect();

    assert_eq!(listed, Endpoint::ALL.map(|endpoint| endpoint.path().to_owned()).into());
}

#[test]
fn every_metric_is_listed_with_its_type_and_labels() {
    let listed: BTreeMap<String, (String, String)> = table("Metric | Type | Labels | Meaning")
        .into_iter()
        .map(|(name, cells)| (name, (cells[0].clone(), cells[1].clone())))
        .collect();

    let known = metrics::ALL
        .iter()
        .map(|family| {
            (
                family.queried(),
                (family.kind.name().to_owned(), family.labels.join(", ")),
            )
        })
        .collect();
    assert_eq!(listed, known);
}

#[test]
fn every_reason_of_a_refusal_is_listed() {
    let listed: BTreeSet<String> = table("Reason | A node is refused because").into_keys().collect();

    assert_eq!(
        listed,
        shroud_keyd::Reason::IDS.iter().copied().map(str::to_owned).collect()
    );
}
