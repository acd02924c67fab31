#!/usr/bin/busybox sh
# The guest's init: loads the modules, then runs the scripts that the harness sends over the second serial port.
# Harness to guest:  RUN <id> <lines>   followed by that many lines of shell;   REBOOT;   POWEROFF
# Guest to harness:  RINGMILL ready;   RINGMILL out <text>;   RINGMILL exit <id> <code>
export PATH=/usr/sbin:/usr/bin HOME=/root
/usr/bin/busybox --install -s /usr/local/bin
# Last in PATH: a real program wins over busybox's applet of the same name.
PATH=$PATH:/usr/local/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module" || echo "RINGMILL could not load $module"; done </modules/order
exec 3</dev/ttyS1 4>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo
echo "RINGMILL ready" >&4
while IFS= read -r line <&3; do
    set -- $line
    case "$1" in
    RUN)
        count=0
        : >/run/script
        while [ "$count" -lt "$3" ]; do
            IFS= read -r text <&3
            printf '%s\n' "$text" >>/run/script
            count=$((count + 1))
        done
        sh -e /run/script </dev/null >/run/out 2>&1 3<&- 4>&-
        code=$?
        sed 's/^/RINGMILL out /' /run/out >&4
        # An unfinished last line must not swallow the next one.
        [ -z "$(tail -c 1 /run/out)" ] || echo >&4
        echo "RINGMILL exit $2 $code" >&4
        ;;
    REBOOT) sync; reboot -f ;;
    POWEROFF) sync; poweroff -f ;;
    esac
done
