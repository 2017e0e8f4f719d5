# What containerd and the kubelet of one node see as their own, in a mount namespace that ends with them: no mount of a
# pod's is ever one of this machine's, and a node that is killed leaves none.
set -e
for folder in $fixed; do   # paths that no setting moves
    mount --bind "$node/own/$$folder" "/$$folder"
done
for name in $sysctls; do   # the kubelet changes them: here it writes into a file
    cat "/proc/sys/$$name" > "$node/own/sysctl"
    cp "$node/own/sysctl" "$node/own/$$(echo "$$name" | tr / .)"
    mount --bind "$node/own/$$(echo "$$name" | tr / .)" "/proc/sys/$$name"
done
exec containerd --config "$node/containerd.toml" >> "$log" 2>&1
