//! The OpenMetrics text format, version 1.0.0, as far as we write it.
//!
//! Prometheus has read it since 2.5. Each family is written once, with all of its samples; the text ends with `# EOF`, by which a reader
//! knows that nothing was cut off.

use std::fmt::Write as _;

use super::Histogram;

/// What the text calls itself in a `Content-Type`.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A metric, as readers know it.
#[derive(Debug)]
pub(crate) struct Family {
    /// Its name without the ending of its samples.
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) unit: Option<&'static str>,
    /// The names of its labels, in the order in which samples give their values.
    pub(crate) labels: &'static [&'static str],
    pub(crate) help: &'static str,
}

/// What can be done with a metric's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A value that comes and goes.
    Gauge,
    /// A total that only rises while the agent and the kernel's object live.
    Counter,
    /// Constant labels; the value is 1.
    Info,
    /// Counts by size.
    Histogram,
}

impl Kind {
    /// Its word in the text.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gauge => "gauge",
            Self::Counter => "counter",
            Self::Info => "info",
            Self::Histogram => "histogram",
        }
    }

    /// What its samples add to the family's name.
    fn ending(self) -> &'static str {
        match self {
            Self::Gauge | Self::Histogram => "",
            Self::Counter => "_total",
            Self::Info => "_info",
        }
    }
}

#[cfg(test)]
impl Family {
    /// The name by which a query asks for it.
    pub(crate) fn queried(&self) -> String {
        format!("{}{}", self.name, self.kind.ending())
    }
}

/// The text so far.
pub(super) struct Text(String);

/// The place behind a family's head, where its samples go.
pub(super) struct Samples<'a> {
    text: &'a mut String,
    family: &'a Family,
}

/// A sample's value.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value {
    Whole(u64),
    Real(f64),
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Whole(value)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Whole(value.into())
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl Text {
    pub(super) fn new() -> Self {
        Self(String::new())
    }

    /// Begins a family.
    pub(super) fn family<'a>(&'a mut self, family: &'a Family) -> Samples<'a> {
        let (text, name) = (&mut self.0, family.name);
        text.push_str(&format!("# TYPE {name} {}\n", family.kind.name()));
        if let Some(unit) = family.unit {
            text.push_str(&format!("# UNIT {name} {unit}\n"));
        }
        text.push_str(&format!("# HELP {name} "));
        escape(family.help, text);
        text.push('\n');
        Samples { text, family }
    }

    /// The whole text.
    pub(super) fn end(mut self) -> String {
        self.0.push_str("# EOF\n");
        self.0
    }
}

impl Samples<'_> {
    /// Writes one sample; the labels' values are in the order of the family's names.
    pub(super) fn add(&mut self, labels: &[&str], value: impl Into<Value>) {
        self.line(self.family.kind.ending(), labels, None, value.into());
    }

    /// Writes the samples of one histogram.
    pub(super) fn histogram(&mut self, labels: &[&str], histogram: &Histogram) {
        for (bound, count) in histogram.buckets() {
            self.line("_bucket", labels, Some(bound), count.into());
        }
        self.line("_sum", labels, None, histogram.sum().as_secs_f64().into());
        self.line("_count", labels, None, histogram.count().into());
    }

    fn line(&mut self, ending: &str, labels: &[&str], bound: Option<f64>, value: Value) {
        let Self { text, family } = self;
        debug_assert_eq!(labels.len(), family.labels.len(), "{}", family.name);
        text.push_str(family.name);
        text.push_str(ending);
        let mut separator = '{';
        for (name, value) in family.labels.iter().zip(labels) {
            text.push(separator);
            text.push_str(name);
            text.push_str("=\"");
            escape(value, text);
            text.push('"');
            separator = ',';
        }
        if let Some(bound) = bound {
            text.push(separator);
            text.push_str(&format!("le=\"{}\"", real(bound)));
            separator = ',';
        }
        if separator == ',' {
            text.push('}');
        }
        match value {
            Value::Whole(value) => writeln!(text, " {value}"),
            Value::Real(value) => writeln!(text, " {}", real(value)),
        }
        .expect("a string takes all there is");
    }
}

/// A number that keeps its point, as the format wants it in `le`.
fn real(value: f64) -> String {
    if value == f64::INFINITY {
        "+Inf".to_owned()
    } else {
        format!("{value:?}")
    }
}

/// Adds a text that is to stand inside a label's quotes, or behind `# HELP`.
fn escape(plain: &str, text: &mut String) {
    for character in plain.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            character => text.push(character),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PACKETS: Family = Family {
        name: "gate_packets",
        kind: Kind::Counter,
        unit: None,
        labels: &["peer", "reason"],
        help: "Packets.",
    };
    const DURATION: Family = Family {
        name: "pass_seconds",
        kind: Kind::Histogram,
        unit: Some("seconds"),
        labels: &["step"],
        help: "How long a \"pass\" takes.",
    };
    const BUILD: Family = Family {
        name: "build",
        kind: Kind::Info,
        unit: None,
        labels: &["version"],
        help: "The build.",
    };

    #[test]
    fn each_kind_is_written_in_its_form() {
        let mut histogram = Histogram::new(&[0.5, 1.0]);
        histogram.observe(Duration::from_millis(750));

        let mut text = Text::new();
        text.family(&PACKETS).add(&["b", "encrypted"], 7u64);
        text.family(&DURATION).histogram(&["set"], &histogram);
        text.family(&BUILD).add(&["1.2.3"], true);

        let expected = r#"# TYPE gate_packets counter
# HELP gate_packets Packets.
gate_packets_total{peer="b",reason="encrypted"} 7
# TYPE pass_seconds histogram
# UNIT pass_seconds seconds
# HELP pass_seconds How long a \"pass\" takes.
pass_seconds_bucket{step="set",le="0.5"} 0
pass_seconds_bucket{step="set",le="1.0"} 1
pass_seconds_bucket{step="set",le="+Inf"} 1
pass_seconds_sum{step="set"} 0.75
pass_seconds_count{step="set"} 1
# TYPE build info
# HELP build The build.
build_info{version="1.2.3"} 1
# EOF
"#;
        assert_eq!(text.end(), expected);
    }

    #[test]
    fn a_value_cannot_leave_its_quotes() {
        let mut text = String::new();

        escape("a\"} 1\nb\\", &mut text);

        assert_eq!(text, r#"a\"} 1\nb\\"#);
    }
}
